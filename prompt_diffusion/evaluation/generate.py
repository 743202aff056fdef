"""Stage "generate": what a model makes of the test split for one vision task, one row per image.

Each image has its own seed, a function of the configured seed, its sample id and its vision task: no image depends on
the others of its batch, and a killed run resumes with the same pictures.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import pyarrow as pa
from pydantic import Field

from prompt_diffusion.data.dataset import Dataset, InContextData, Sample
from prompt_diffusion.data.records import Split, generations_table
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources, Method
from prompt_diffusion.evaluation.models import open_pipeline
from prompt_diffusion.evaluation.rmse import ImageArray
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sharded import MakeShard, ShardRows
from prompt_diffusion.store.stage import Context, ShardedStage
from prompt_diffusion.vision_tasks import Draw, ExamplePolicy, find_vision_task

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

VERSION: Final = 2
# Part of what a shard is, so a constant and not a resource: a resumed run must cut the rows as the killed one did.
SHARD_ROWS: Final = 96
_SEED_BITS: Final = 63


class GenerateConfig(FrozenModel):
    """What is generated."""

    vision_task: str
    """The vision task whose pairs, queries and prompts are shown."""
    num_samples: int = Field(ge=1)
    """Queries of the split, the first in order."""
    draw: Draw = "row"
    """What a query is: a row of the split, or a prompt group by one of its rows, drawn at random, as published."""
    seed: int = Field(default=0, ge=0)
    """Root of the images' seeds and of the choice of examples."""
    num_inference_steps: int = Field(ge=1)
    """Steps of the sampler."""
    guidance_scale: float = Field(ge=1.0)
    """Guidance weight; 1 is no guidance, and then the negative prompt plays no part."""
    example_policy: ExamplePolicy | None
    """Where the example pair comes from; None shows no pair."""
    use_text: bool = True
    """Whether the prompt is given; without it the text is empty."""
    is_noise_shared: bool = False
    """Whether the seed leaves out the vision task, so that runs that differ in the pair alone start from one noise."""
    prompt_suffix: str = ""
    """Appended to a prompt that is not empty."""
    negative_prompt: str = ""
    """Text of the unconditional branch."""
    split: Split = "test"
    """The split that queries come from, and examples too."""


def build_generate_config(config: EvaluateConfig, method: Method, vision_task: str) -> GenerateConfig:
    """Return what one benchmark cell generates; CN(FT) is shown the query alone."""
    is_map_to_image = find_vision_task(vision_task).direction == "map_to_image"
    guidance_scale = config.map_to_image_guidance_scale if is_map_to_image else config.image_to_map_guidance_scale
    steps = config.map_to_image_num_inference_steps if is_map_to_image else config.image_to_map_num_inference_steps
    return GenerateConfig(
        vision_task=vision_task,
        num_samples=config.num_samples,
        draw=config.draw,
        seed=config.seed,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        example_policy=config.example_policy if method == "Prompt Diffusion" else None,
        prompt_suffix=config.prompt_suffix,
        negative_prompt=config.negative_prompt,
        split=config.split,
    )


@dataclass(frozen=True)
class Generate(ShardedStage[EvaluateResources]):
    """The stage: a model's answers to the queries of one vision task. ValueError where the split has too few rows."""

    config: GenerateConfig
    model: ManifestRef
    dataset: Dataset

    @cached_property
    def rows(self) -> InContextData:
        """The rows of the split."""
        return open_data(self.dataset, self.config.split)

    @property
    def title(self) -> str:
        """The name shown to people."""
        return f"generate {self.config.vision_task} with {self.model.fingerprint[:8]}"

    def identify(self) -> StageIdentity:
        """Return configuration, model, pairs and, of the maps, those of the vision task's own condition."""
        condition = find_vision_task(self.config.vision_task).condition
        inputs = (StageInput.of("model", self.model), *self.dataset.list_inputs([condition]))
        return StageIdentity(
            stage="generate", version=VERSION, config=self.config.model_dump(mode="json"), inputs=inputs
        )

    def count_shards(self) -> int:
        """Return the shards that the samples fill."""
        return math.ceil(self.config.num_samples / SHARD_ROWS)

    @contextmanager
    def open_maker(self, context: Context[EvaluateResources]) -> Iterator[MakeShard]:
        """Yield the function that generates a shard's images, on the resources' device."""
        queries = choose_query_rows(self.rows, self.config)
        resources = context.resources

        def make_shard(index: int) -> ShardRows:
            rows = queries[index * SHARD_ROWS : (index + 1) * SHARD_ROWS]
            with open_pipeline(self.model, resources) as pipeline:
                return _generate_rows(self.config, self.rows, rows, pipeline, resources.batch_size), []

        yield make_shard


@dataclass(frozen=True)
class Generations:
    """Generated images, each with the sample whose query it answers."""

    sample_ids: list[str]
    """In the order of the images."""
    images: ImageArray
    """uint8 (n, h, w, 3)."""

    def __len__(self) -> int:
        return len(self.sample_ids)


def compute_image_seed(config: GenerateConfig, sample_id: str) -> int:
    """Return the seed of one image, 0 <= seed < 2^63."""
    task = "" if config.is_noise_shared else config.vision_task
    return hash_seed(f"image/{config.seed}/{task}/{sample_id}")


def choose_example_rows(data: InContextData, policy: ExamplePolicy, seed: int, rows: Iterable[int]) -> list[int]:
    """Return the row of each query's example: a function of (seed, sample id), the same for every vision task."""
    return [
        data.choose_example(policy, row, np.random.default_rng(hash_seed(f"example/{seed}/{data.sample_ids[row]}")))
        for row in rows
    ]


def open_data(dataset: Dataset, split: Split) -> InContextData:
    """Return the rows of a split with all maps, opened once per process for all callers."""
    return _open_data(dataset.pairs.uri, tuple(sorted((name, ref.uri) for name, ref in dataset.maps.items())), split)


class QueryChoice(Protocol):
    """Which queries: the fields that every configuration with queries has."""

    num_samples: int
    draw: Draw
    seed: int


def choose_query_rows(data: InContextData, choice: QueryChoice) -> list[int]:
    """Return the rows that are queries, in order: the first rows of the split or, drawn by group, one row each of its first
    prompt groups, a function of the seed and the group.

    ValueError where the split has fewer than asked for: a smaller n gives another result.
    """
    groups: dict[str, list[int]] = {}
    for row, group in enumerate(data.group_ids):
        groups.setdefault(group if choice.draw == "group" else str(row), []).append(row)
    if choice.num_samples > len(groups):
        kind = "prompt groups" if choice.draw == "group" else "rows"
        raise ValueError(
            f"{choice.num_samples} samples are asked for, and the {data.split} split has {len(groups)} {kind}"
        )
    first = islice(groups.items(), choice.num_samples)
    return [rows[hash_seed(f"query/{choice.seed}/{group}") % len(rows)] for group, rows in first]


def check_makers(identity: StageIdentity, model: ManifestRef, pairs: ManifestRef) -> None:
    """Raise ValueError where images of that identity were not made by that model, from those pairs."""
    for role, ref in (("model", model), ("pairs", pairs)):
        found = identity.digests[role]
        if found != ref.fingerprint:
            raise ValueError(f"the images were made with the {role} {found}, not {ref.fingerprint}")


def read_generations(generations: ManifestRef) -> Generations:
    """Return the images of a sealed generation with their samples; ValueError names a sample that has two images."""
    table = open_manifest(generations.uri).read_table(["sample_id", "image"])
    sample_ids: list[str] = table["sample_id"].to_pylist()
    repeated = next((name for name, count in Counter(sample_ids).items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"{generations.uri} has several images of the sample {repeated!r}")
    images = np.stack([decode_image(image["bytes"]) for image in table["image"].to_pylist()])
    return Generations(sample_ids, images)


@lru_cache(maxsize=4)
def _open_data(pairs_uri: str, map_uris: tuple[tuple[str, str], ...], split: Split) -> InContextData:
    maps = {condition: open_manifest(uri) for condition, uri in map_uris}
    return InContextData(open_manifest(pairs_uri), maps, split)


def hash_seed(text: str) -> int:
    """Return the seed that a text stands for, 0 <= seed < 2^63."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> (64 - _SEED_BITS)


def _generate_rows(
    config: GenerateConfig, data: InContextData, rows: list[int], pipeline: "PromptDiffusionPipeline", batch_size: int
) -> pa.Table:
    """Return the table of one shard."""
    vision_task = find_vision_task(config.vision_task)
    # Without a pair the example's row is not shown: the query's own stands in, so that `assemble` has one.
    policy = config.example_policy
    example_rows = choose_example_rows(data, policy, config.seed, rows) if policy else rows
    samples = [data.assemble(vision_task, row, example) for row, example in zip(rows, example_rows, strict=True)]
    seeds = [compute_image_seed(config, sample.sample_id) for sample in samples]
    images: list[bytes] = []
    for start in range(0, len(samples), batch_size):
        batch = slice(start, start + batch_size)
        images += [encode_png(image) for image in _generate_batch(config, samples[batch], seeds[batch], pipeline)]
    return generations_table([sample.sample_id for sample in samples], config.vision_task, seeds, images)


def _generate_batch(
    config: GenerateConfig, samples: list[Sample], seeds: list[int], pipeline: "PromptDiffusionPipeline"
) -> ImageArray:
    """Return uint8 images (n, h, w, 3)."""
    example_pair = None
    if config.example_policy is not None:
        example_pair = (_stack(samples, "example_source"), _stack(samples, "example_target"))
    return call_pipeline(
        pipeline,
        _stack(samples, "query"),
        seeds,
        prompt=[_write_prompt(config, sample.prompt) for sample in samples],
        example_pair=example_pair,
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.num_inference_steps,
    )


def call_pipeline(
    pipeline: "PromptDiffusionPipeline",
    queries: ImageArray,
    seeds: Sequence[int],
    **options: Any,  # noqa: ANN401 - the call's own
) -> ImageArray:
    """Return what a pipeline makes of queries, each from its own seed and at its own size: uint8 (n, h, w, 3) both."""
    import torch

    output = pipeline(
        query=queries,
        height=queries.shape[1],
        width=queries.shape[2],
        # On the CPU, so that a seed means the same noise on every device.
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="uint8",
        **options,
    )
    images: ImageArray = output.images
    return images


def _stack(samples: list[Sample], field: str) -> ImageArray:
    return np.stack([getattr(sample, field) for sample in samples])


def _write_prompt(config: GenerateConfig, prompt: str) -> str:
    if not config.use_text or not prompt:
        return ""
    return prompt + config.prompt_suffix
