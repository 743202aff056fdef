"""Training samples: what is random in each, and micro-batches of them, made on the CPU ahead of the device.

Everything random in a sample (vision task, rows, dropout, timestep, noise) is a function of (seed, index, sizes) alone. Its
data is read through the local shard cache.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompt_diffusion.data.cached_shard import Array
from prompt_diffusion.data.dataset import InContextData, check_aligned, check_made_of
from prompt_diffusion.data.records import Split
from prompt_diffusion.data.sampler import GroupOrder, Order, RowOrder, sample_generator
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.engine.noise import draw_timestep
from prompt_diffusion.store.manifest import Manifest, open_manifest
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import IMAGE_TARGET, TrainInputs
from prompt_diffusion.vision_tasks import Draw, VisionTask, find_vision_task

Floats = NDArray[np.float32]


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

    def read_example_source(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self.data.rows.image(self.example_row, "input", self.vision_task.source_condition, out)

    def read_example_target(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self.data.rows.image(self.example_row, "input", self.vision_task.target_condition, out)

    def read_query(self, out: Array | None = None) -> Array:
        """Return uint8 H, W, 3, in ``out`` if given."""
        return self.data.rows.image(self.row, "edited", self.vision_task.source_condition, out)

    def sample_posterior(self, out: Array | None = None) -> Array:
        """Draw from the posterior of the target, float32 C, h, w, in ``out`` if given."""
        mean, std = self.data.read_posterior(self.vision_task.target_condition, self.row)
        return np.add(mean, std * self.sample_noise(mean.shape), out=out)

    def sample_noise(self, shape: Sequence[int], out: Array | None = None) -> Array:
        """Draw standard Gaussian noise, float32, in ``out`` if given."""
        return self.generator.standard_normal(tuple(shape), dtype=np.float32, out=out)


@dataclass(frozen=True)
class InContextBatch:
    """A micro-batch on the CPU, images as uint8 N, H, W, channels."""

    labels: list[int]
    """Positions of the vision tasks in the recipe."""
    example_pairs: tuple[Tensor, Tensor] | None
    """Example sources and targets, N, H, W, 3 each; None for a model without example pairs."""
    has_example: Tensor
    """Whether a sample keeps its example pair, N."""
    queries: Tensor
    """N, H, W, 3."""
    clean: Tensor
    """Samples of the posterior, float32 N, C, h, w."""
    noise: Tensor
    """Standard Gaussian noise, as ``clean``."""
    timesteps: Tensor
    """int64 N."""
    text: Tensor
    """Text embeddings, float32 N, L, C."""


class TrainingData:
    """One split of a dataset, with latents and text embeddings."""

    def __init__(
        self, inputs: TrainInputs, cache: ShardCache, seed: int, split: Split = "train", draw: Draw = "row"
    ) -> None:
        """Open the inputs; ValueError where they do not belong together."""
        pairs = open_manifest(inputs.pairs.uri)
        maps = {condition: open_manifest(ref.uri) for condition, ref in inputs.maps.items()}
        self.rows = InContextData(pairs, maps, split, cache)
        self.text = open_manifest(inputs.text.uri)
        check_made_of(self.text, "pairs", pairs)
        self.latents: dict[str | None, Manifest] = {}
        for target, ref in inputs.latents.items():
            manifest = open_manifest(ref.uri)
            check_aligned(manifest, "images", pairs if target == IMAGE_TARGET else maps[target])
            self.latents[None if target == IMAGE_TARGET else target] = manifest
        self.order: Order = RowOrder(seed, self.rows.shard_rows)
        if draw == "group":
            self.order = GroupOrder(seed, self.rows.shard_rows, self.rows.group_ids)
        self.cache = cache

    @property
    def manifests(self) -> list[Manifest]:
        """Every manifest that a sample may be read from."""
        return [self.rows.pairs, *self.rows.maps.values(), *self.latents.values(), self.text]

    def read_posterior(self, target: str | None, row: int) -> tuple[Floats, Floats]:
        """Return mean and standard deviation, float32 C, h, w, of a row's target (None: the photograph)."""
        shard, position = self.rows.places[row]
        manifest = self.latents[target]
        return (
            self.cache.read_row(manifest, shard, "edited_mean", position),
            self.cache.read_row(manifest, shard, "edited_std", position),
        )

    def read_text(self, row: int, out: Array | None = None) -> Floats:
        """Return the embedding, float32 L, C, of a row's caption, in ``out`` if given."""
        return self.cache.read_row(
            self.text, self.rows.places[row][0], "embedding", self.rows.caption_positions[row], out
        )


def draw_sample(config: TrainConfig, data: Mapping[str, TrainingData], index: int) -> SampleDraw:
    """Draw sample ``index`` of a training's stream: a function of (seed, index, sizes) alone.

    ``data``: the data of each vision task, by its name.
    """
    generator = sample_generator(config.seed, index)
    vision_task = find_vision_task(config.vision_tasks[int(generator.integers(len(config.vision_tasks)))])
    its = data[vision_task.name]
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
        has_text=u >= text,
        has_example=config.method == "prompt_diffusion" and not first <= u < first + drop.example_pair,
        generator=generator,
    )


def open_training_data(
    config: TrainConfig, inputs: TrainInputs, cache: ShardCache, split: Split
) -> dict[str, TrainingData]:
    """Open the data of each vision task of a recipe; tasks of one dataset share it."""
    used = inputs.narrow(config.vision_tasks)
    datasets = [TrainingData(each, cache, config.seed, split, config.draw) for each in used.datasets]
    return {name: datasets[used.find_dataset(name)] for name in config.vision_tasks}


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
            labels=[self.config.vision_tasks.index(d.vision_task.name) for d in draws],
            example_pairs=example_pairs,
            has_example=torch.tensor([d.has_example for d in draws], pin_memory=self.pins_memory),
            queries=self._gather([d.read_query for d in draws]),
            clean=clean,
            noise=noise,
            timesteps=torch.tensor(timesteps, pin_memory=self.pins_memory),
            text=self._gather([partial(self._read_text, d) for d in draws]),
        )

    def close(self) -> None:
        """Stop the threads that fetch ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

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


class WindowFetcher:
    """Fetches the shards of the stream's current window and of the next one, ahead of the samples."""

    def __init__(self, data: TrainingData, pool: Executor) -> None:
        self.data, self._pool = data, pool
        self._lock = threading.Lock()
        self._asked: set[tuple[int, int]] = set()

    def advance(self, index: int) -> None:
        """Start fetching for the window of this sample index, unless that was done."""
        order = self.data.order
        epoch, number = order.find_window(index)
        with self._lock:
            if (epoch, number) in self._asked:
                return
            self._asked.add((epoch, number))
        windows = order.windows(epoch)
        following = windows[number + 1] if number + 1 < len(windows) else order.windows(epoch + 1)[0]
        for shard in (*windows[number], *following):
            for manifest in self.data.manifests:
                # An error here is not lost: it is raised again where a row of the shard is read.
                self._pool.submit(self.data.cache.fetch, manifest, shard)
