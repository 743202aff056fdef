"""Training samples: what is random in each, and micro-batches of them, made on the CPU ahead of the device.

Everything random in a sample (vision task, rows, dropout, timestep, noise) is a function of (seed, index, sizes) alone. Its
data is read through the local shard cache.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prompt_diffusion.data.augmentation import Augmentation, draw_augmentation
from prompt_diffusion.data.cached_shard import Array
from prompt_diffusion.data.dataset import Side
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.engine.noise import draw_timestep
from prompt_diffusion.training.augmented import MadeTargets, find_rows
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.rows import Floats, TrainingData, WindowFetcher
from prompt_diffusion.vision_tasks import VisionTask, find_vision_task


@dataclass(frozen=True)
class SampleDraw:
    """Everything that is random in one training sample."""

    vision_task: VisionTask
    data: "TrainingData"
    """Where its rows are."""
    row: int
    example_row: int
    has_text: bool
    has_example: bool
    generator: np.random.Generator
    """Draws the rest, in this order: timestep, the posterior's sample, noise."""
    augmentation: Augmentation | None = None
    """The target function that stands in for the vision task's map; None shows the map itself."""

    @property
    def is_target_made(self) -> bool:
        """Whether the target is an augmentation's picture: no stage has encoded it."""
        return self.augmentation is not None and self.vision_task.direction == "image_to_map"

    def read_example_source(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self._read_source(self.example_row, "input", out)

    def read_example_target(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self._read_target(self.example_row, "input", out)

    def read_query(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self._read_source(self.row, "edited", out)

    def read_target(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self._read_target(self.row, "edited", out)

    def sample_posterior(self, out: Array | None = None) -> Array:
        """Draw from the posterior of the target, float32 C, h, w, in ``out`` if given; of a made target, only the noise."""
        if self.is_target_made:
            return self.sample_noise(self.data.latent_shape, out)
        mean, std = self.data.read_posterior(self.vision_task.target_condition, self.row)
        return np.add(mean, std * self.sample_noise(mean.shape), out=out)

    def sample_noise(self, shape: Sequence[int], out: Array | None = None) -> Array:
        """Draw standard Gaussian noise, float32, in ``out`` if given."""
        return self.generator.standard_normal(tuple(shape), dtype=np.float32, out=out)

    def _read_source(self, row: int, side: Side, out: Array | None) -> Array:
        if self.augmentation is not None and self.vision_task.direction == "map_to_image":
            return self.augmentation.make(partial(self.data.rows.image, row, side))
        return self.data.rows.image(row, side, self.vision_task.source_condition, out)

    def _read_target(self, row: int, side: Side, out: Array | None) -> Array:
        if self.augmentation is not None and self.is_target_made:
            return self.augmentation.make(partial(self.data.rows.image, row, side))
        return self.data.rows.image(row, side, self.vision_task.target_condition, out)


@dataclass(frozen=True)
class InContextBatch:
    """A micro-batch on the CPU, images as uint8 N, H, W, channels."""

    labels: list[int]
    """Positions of the vision tasks in the recipe; of augmented samples, those of the families, which follow."""
    example_pairs: tuple[Tensor, Tensor] | None
    """Example sources and targets, N, H, W, 3 each; None for a model without example pairs."""
    has_example: Tensor
    """Whether a sample keeps its example pair, N."""
    queries: Tensor
    """N, H, W, 3."""
    clean: Tensor
    """Samples of the posterior, float32 N, C, h, w; where a target is yet to be encoded, the noise to sample it with."""
    noise: Tensor
    """Standard Gaussian noise, as ``clean``."""
    timesteps: Tensor
    """int64 N."""
    text: Tensor
    """Text embeddings, float32 N, L, C."""
    made_targets: MadeTargets | None = None
    """The targets that are yet to be encoded; None where there are none."""


def draw_sample(config: TrainConfig, data: Mapping[str, TrainingData], index: int) -> SampleDraw:
    """Draw sample ``index`` of a training's stream: a function of (seed, index, sizes) alone.

    ``data``: the data of each vision task, by its name.
    """
    generator = sample_generator(config.seed, index)
    vision_task = find_vision_task(config.vision_tasks[int(generator.integers(len(config.vision_tasks)))])
    augmentation = draw_augmentation(config.augmentation, config.seed, index)
    its = data[vision_task.name] if augmentation is None else find_rows(data, vision_task, augmentation.family)
    is_map = vision_task.direction == "image_to_map"
    policies = config.image_to_map_examples if is_map else config.map_to_image_examples
    policy = list(policies)[int(generator.choice(len(policies), p=list(policies.values())))]
    row = its.order.row_at(index)
    example_row = its.rows.choose_example(policy, row, generator)
    drop, u = config.dropout, generator.random()
    text = drop.text_image_to_map if is_map else drop.text_map_to_image
    first = text - drop.overlap  # the example pair's interval begins inside the text's and ends beyond it
    return SampleDraw(
        vision_task=vision_task,
        data=its,
        row=row,
        example_row=example_row,
        has_text=u >= text and not (is_map and augmentation is not None),  # a text would name another map
        has_example=config.method == "prompt_diffusion" and not first <= u < first + drop.example_pair,
        generator=generator,
        augmentation=augmentation,
    )


class BatchMaker:
    """Makes micro-batches of a training's stream; may be called from any thread."""

    def __init__(
        self,
        config: TrainConfig,
        data: Mapping[str, TrainingData],
        fixed_texts: Mapping[str, Floats],
        num_timesteps: int,
        num_threads: int = 1,
        pins_memory: bool = False,
    ) -> None:
        """Take the data of each vision task, and the embeddings L, C of the empty text and of the tasks' own texts."""
        self.config, self.data, self.fixed_texts = config, data, fixed_texts
        self.num_timesteps, self.pins_memory = num_timesteps, pins_memory
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        self._fetchers = [
            WindowFetcher(each, self._pool) for each in {id(each): each for each in data.values()}.values()
        ]

    def make(self, indices: range) -> InContextBatch:
        """Return the micro-batch of these sample indices."""
        for fetcher in self._fetchers:
            fetcher.advance(indices.start)
        draws = [draw_sample(self.config, self.data, index) for index in indices]
        timesteps = [draw_timestep(d.generator, self.config.noise, self.num_timesteps) for d in draws]
        clean = self._gather([d.sample_posterior for d in draws])
        noise = self._gather([partial(d.sample_noise, clean.shape[1:]) for d in draws])
        example_pairs = None
        if self.config.method == "prompt_diffusion":
            example_pairs = (
                self._gather([d.read_example_source for d in draws]),
                self._gather([d.read_example_target for d in draws]),
            )
        return InContextBatch(
            labels=[self._label(d) for d in draws],
            example_pairs=example_pairs,
            has_example=torch.tensor([d.has_example for d in draws], pin_memory=self.pins_memory),
            queries=self._gather([d.read_query for d in draws]),
            clean=clean,
            noise=noise,
            timesteps=torch.tensor(timesteps, pin_memory=self.pins_memory),
            text=self._gather([partial(self._read_text, d) for d in draws]),
            made_targets=self._make_targets(draws),
        )

    def close(self) -> None:
        """Stop the threads that fetch ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _label(self, draw: SampleDraw) -> int:
        if draw.augmentation is None:
            return self.config.vision_tasks.index(draw.vision_task.name)
        return len(self.config.vision_tasks) + list(self.config.augmentation).index(draw.augmentation.family)

    def _make_targets(self, draws: Sequence[SampleDraw]) -> MadeTargets | None:
        slots = [slot for slot, draw in enumerate(draws) if draw.is_target_made]
        if not slots:
            return None
        images = self._gather([draws[slot].read_target for slot in slots])
        return MadeTargets(torch.tensor(slots, pin_memory=self.pins_memory), images)

    def _read_text(self, draw: SampleDraw, out: Array | None = None) -> Array:
        fixed = draw.vision_task.text if draw.has_text else ""
        return draw.data.read_text(draw.row, out) if fixed is None else self.fixed_texts[fixed]

    def _gather(self, reads: Sequence[Callable[[Array | None], Array]]) -> Tensor:
        """Stack what is read into one tensor: the first gives shape and type, the others may write into the slot they get."""
        first = reads[0](None)
        kind = torch.from_numpy(first).dtype
        gathered = torch.empty((len(reads), *first.shape), dtype=kind, pin_memory=self.pins_memory)
        slots: Array = gathered.numpy()
        slots[0] = first
        for slot, read in zip(slots[1:], reads[1:], strict=True):
            values = read(slot)
            if values is not slot:
                slot[...] = values
        return gathered
