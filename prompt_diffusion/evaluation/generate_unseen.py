"""Stage ``generate_unseen``: a model's answers to what it never saw, with the example pair alone: no text, no guidance.

A shard is a case. All cases of a query start from the same noise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from pydantic import Field, model_validator

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.held_out import HELD_OUT
from prompt_diffusion.data.records import Split, generations_table
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.evaluation.config import EvaluateResources
from prompt_diffusion.evaluation.generate import Generations, call_pipeline, choose_query_rows, hash_seed, open_data
from prompt_diffusion.evaluation.models import open_pipeline
from prompt_diffusion.evaluation.rmse import ImageArray
from prompt_diffusion.evaluation.unseen_cases import CASES, CaseQuery, CaseRows, find_case
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sharded import MakeShard, ShardRows
from prompt_diffusion.store.stage import Context, ShardedStage
from prompt_diffusion.vision_tasks import Draw, find_vision_task

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

VERSION: Final = 1  # of the held-out families and of the choice of examples, too


class UnseenConfig(FrozenModel):
    """What is asked, of which queries."""

    cases: tuple[str, ...] = tuple(CASES)
    """The cases, by name."""
    num_samples: int = Field(default=96, ge=1)
    """Queries of the split, the first in order."""
    draw: Draw = "row"
    """What a query is: a row of the split, or a prompt group by one of its rows."""
    seed: int = Field(default=0, ge=0)
    """Root of the images' seeds and of the choice of examples."""
    num_inference_steps: int = Field(default=2, ge=1, le=1000)
    """Steps of the sampler."""
    split: Split = "test"
    """The split that queries and examples come from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.cases:
            find_case(name)
        if len(set(self.cases)) != len(self.cases) or not self.cases:
            raise ValueError(f"cases must name at least one case, and each once: {', '.join(self.cases) or 'none'}")
        return self

    def list_inputs(self, dataset: Dataset) -> tuple[StageInput, ...]:
        """Return the pairs and the maps that the cases are built of."""
        return dataset.list_inputs(sorted({each for name in self.cases for each in find_case(name).conditions}))

    def build_queries(self, dataset: Dataset, name: str) -> list[CaseQuery]:
        """Return the queries of a case; ValueError where the split has too few rows."""
        data = open_data(dataset, self.split)
        return CaseRows(data, self.seed).build(find_case(name), choose_query_rows(data, self))


@dataclass(frozen=True)
class GenerateUnseen(ShardedStage[EvaluateResources]):
    """The stage: a model's answers to each case, a shard each. ValueError for a model that was trained on one of them."""

    config: UnseenConfig
    model: ManifestRef
    dataset: Dataset

    @property
    def title(self) -> str:
        """The name shown to people."""
        return f"generate unseen families with {self.model.fingerprint[:8]}"

    def identify(self) -> StageIdentity:
        """Return what is asked, model, pairs and maps."""
        inputs = (StageInput.of("model", self.model), *self.config.list_inputs(self.dataset))
        config = self.config.model_dump(mode="json")
        return StageIdentity(stage="generate_unseen", version=VERSION, config=config, inputs=inputs)

    def count_shards(self) -> int:
        """Return the number of cases."""
        return len(self.config.cases)

    @contextmanager
    def open_maker(self, context: Context[EvaluateResources]) -> Iterator[MakeShard]:
        """Yield the function that generates a case's images, on the resources' device."""
        check_unseen(self.model, self.config.cases)
        resources = context.resources

        def make_shard(index: int) -> ShardRows:
            name = self.config.cases[index]
            queries = self.config.build_queries(self.dataset, name)
            seeds = [hash_seed(f"image/{self.config.seed}//{query.sample_id}") for query in queries]
            images: list[bytes] = []
            with open_pipeline(self.model, resources) as pipeline:
                for start in range(0, len(queries), resources.batch_size):
                    batch = slice(start, start + resources.batch_size)
                    images += map(encode_png, self._generate(queries[batch], seeds[batch], pipeline))
            return generations_table([query.sample_id for query in queries], name, seeds, images), []

        yield make_shard

    def _generate(
        self, queries: Sequence[CaseQuery], seeds: Sequence[int], pipeline: "PromptDiffusionPipeline"
    ) -> ImageArray:
        """Return uint8 images (n, h, w, 3)."""
        return call_pipeline(
            pipeline,
            np.stack([query.query for query in queries]),
            seeds,
            prompt=[""] * len(queries),
            example_pair=(
                np.stack([query.example_source for query in queries]),
                np.stack([query.example_target for query in queries]),
            ),
            guidance_scale=1.0,
            num_inference_steps=self.config.num_inference_steps,
        )


def check_unseen(model: ManifestRef, cases: Sequence[str]) -> None:
    """Raise ValueError where a model's own recipe trains a case's family as a vision task, so that it is not unseen."""
    tasks = open_manifest(model.uri).identity.config.get("vision_tasks", [])
    trained = {find_vision_task(name).condition for name in tasks}
    for name in cases:
        family = HELD_OUT.get(find_case(name).family)
        if family is not None and family.condition in trained:
            raise ValueError(
                f"the case {name!r} is not unseen to a model trained on maps of {family.condition}: leave it out"
            )


def read_unseen(generations: ManifestRef) -> dict[str, Generations]:
    """Return the images of a sealed generation by case."""
    table = open_manifest(generations.uri).read_table(["vision_task", "sample_id", "image"])
    found: dict[str, tuple[list[str], list[ImageArray]]] = {}
    for name, sample_id, image in zip(*(column.to_pylist() for column in table.columns), strict=True):
        ids, images = found.setdefault(name, ([], []))
        ids.append(sample_id)
        images.append(decode_image(image["bytes"]))
    return {name: Generations(ids, np.stack(images)) for name, (ids, images) in found.items()}
