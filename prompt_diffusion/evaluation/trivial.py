"""Stage "trivial": what an RMSE is worth without any model.

- mean_map: the mean of the training split's maps, the same answer for every query;
- copy_query: the query itself;
- copy_example_target: the example's target, as it is. Under an example policy that shows the same scene this can beat
  any model, and says that the table is measured with a leak.
"""

import json
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from pydantic import Field

from prompt_diffusion.data.dataset import Dataset, InContextData
from prompt_diffusion.data.records import Split
from prompt_diffusion.evaluation.config import EvaluateConfig
from prompt_diffusion.evaluation.generate import choose_example_rows, choose_query_rows, open_data
from prompt_diffusion.evaluation.rmse import ImageArray, compute_rmse
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.vision_tasks import VISION_TASKS, Draw, ExamplePolicy, VisionTask

VERSION: Final = 2
TRIVIAL_FILE: Final = "trivial.json"
BaselineName = Literal["mean_map", "copy_query", "copy_example_target"]
# A mean of ten thousand maps is stable; the 280,000 of the full training split would cost an hour for no digit.
MAX_MEAN_MAPS: Final = 10_000


class TrivialConfig(FrozenModel):
    """What the trivial baselines are made on: the same queries and examples as the cells."""

    num_samples: int = Field(ge=1)
    """Queries of the split, the first in order."""
    draw: Draw = "row"
    """What a query is: a row of the split, or a prompt group by one of its rows, drawn at random, as published."""
    seed: int = Field(ge=0)
    """Root of the choice of examples."""
    example_policy: ExamplePolicy
    """Where the copied example comes from."""
    split: Split = "test"
    """The split that queries come from."""


class TrivialResult(FrozenModel):
    """The error of one trivial baseline."""

    baseline: BaselineName
    """What was given as the answer."""
    vision_task: str
    """An image-to-map vision task."""
    metric: Literal["rmse"] = "rmse"
    """How it was measured."""
    value: float = Field(ge=0.0, allow_inf_nan=False)
    """The number; lower is better."""


def build_trivial_config(config: EvaluateConfig) -> TrivialConfig:
    """Return the part of an evaluation that the trivial baselines depend on."""
    return TrivialConfig(
        num_samples=config.num_samples,
        draw=config.draw,
        seed=config.seed,
        example_policy=config.example_policy,
        split=config.split,
    )


@dataclass(frozen=True)
class MeasureTrivial(Stage[None]):
    """The stage: the trivial baselines of every image-to-map vision task, sealed as ``trivial.json``."""

    config: TrivialConfig
    dataset: Dataset

    @property
    def title(self) -> str:
        """The name shown to people."""
        return "trivial baselines"

    def identify(self) -> StageIdentity:
        """Return queries and examples, pairs and maps."""
        inputs = self.dataset.list_inputs(_list_conditions())
        config = self.config.model_dump(mode="json")
        return StageIdentity(stage="trivial", version=VERSION, config=config, inputs=inputs)

    def run(self, context: Context[None]) -> ManifestRef:
        """Measure, and seal the numbers."""
        data, train = open_data(self.dataset, self.config.split), open_data(self.dataset, "train")
        choose_query_rows(data, self.config)  # too many are refused before the work begins
        results = [result for task in _list_tasks() for result in _measure_task(self.config, task, data, train)]
        content = json.dumps([result.model_dump() for result in results], indent=2)
        file = write_file(self.identity, context.store, TRIVIAL_FILE, content.encode())
        return seal_manifest(self.identity, context.store, [file], counts={"rows": len(results)})


def read_trivial(trivial: ManifestRef) -> list[TrivialResult]:
    """Return the sealed trivial baselines."""
    content = json.loads(open_manifest(trivial.uri).read_file(TRIVIAL_FILE))
    return [TrivialResult.model_validate(row) for row in content]


def compute_mean_map(data: InContextData, condition: str) -> ImageArray:
    """Return the mean, pixel by pixel, of a split's edited maps (its first 10,000), uint8 (h, w, 3)."""
    num_maps = min(data.num_rows, MAX_MEAN_MAPS)
    total = np.zeros_like(data.image(0, "edited", condition), dtype=np.float64)
    for row in range(num_maps):
        total += data.image(row, "edited", condition)
    mean: ImageArray = np.round(total / num_maps).astype(np.uint8)
    return mean


def _list_tasks() -> list[VisionTask]:
    return [task for task in VISION_TASKS.values() if task.direction == "image_to_map"]


def _list_conditions() -> list[str]:
    return sorted({task.condition for task in _list_tasks()})


def _measure_task(
    config: TrivialConfig, task: VisionTask, data: InContextData, train: InContextData
) -> list[TrivialResult]:
    rows = choose_query_rows(data, config)
    example_rows = choose_example_rows(data, config.example_policy, config.seed, rows)
    truths = np.stack([data.image(row, "edited", task.condition) for row in rows])
    mean_map = compute_mean_map(train, task.condition)
    answers: dict[BaselineName, ImageArray] = {
        "mean_map": np.broadcast_to(mean_map, truths.shape),
        "copy_query": np.stack([data.image(row, "edited", None) for row in rows]),
        "copy_example_target": np.stack([data.image(row, "input", task.condition) for row in example_rows]),
    }
    return [
        TrivialResult(baseline=name, vision_task=task.name, value=compute_rmse(images, truths))
        for name, images in answers.items()
    ]
