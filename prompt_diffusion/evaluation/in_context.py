"""Stage "in_context": does the example pair alone decide which map comes out?

The same queries, with no text, no guidance and the same noise, are generated under an example pair of each image-to-map
vision task and under none. An output counts as the one of {each condition's true map, the photograph} that it is
nearest to by RMSE. A model that reads the pair puts every output of a row under the row's own condition.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.records import Split
from prompt_diffusion.evaluation.cells import read_truths
from prompt_diffusion.evaluation.config import EvaluateConfig
from prompt_diffusion.evaluation.generate import GenerateConfig, read_generations
from prompt_diffusion.evaluation.rmse import ImageArray, compute_image_errors
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.vision_tasks import VISION_TASKS

logger = logging.getLogger(__name__)

VERSION: Final = 2
IN_CONTEXT_FILE: Final = "in_context.json"
NONE: Final = "none"
# The vision tasks whose pairs are shown, by condition.
SHOWN_TASKS: Final[Mapping[str, str]] = {
    task.condition: task.name for task in VISION_TASKS.values() if task.direction == "image_to_map"
}


class InContextResult(FrozenModel):
    """The confusion matrix of the in-context test."""

    labels: list[str]
    """Rows and columns; "none" as a row: no pair was shown; as a column: no map came out, but a photograph."""
    confusion: list[list[int]]
    """confusion[shown][came_out], in numbers of queries."""
    accuracy: float = Field(ge=0.0, le=1.0)
    """The share of outputs that are the shown condition's map, over the rows in which a pair was shown."""


def build_shown_configs(config: EvaluateConfig) -> dict[str, GenerateConfig]:
    """Return what is generated under each kind of pair, and under "none"."""
    under_none = GenerateConfig(
        vision_task=next(iter(SHOWN_TASKS.values())),
        num_samples=config.num_in_context,
        draw=config.draw,
        seed=config.seed,
        num_inference_steps=config.image_to_map_num_inference_steps,
        guidance_scale=1.0,
        example_policy=None,
        use_text=False,
        is_noise_shared=True,
        split=config.split,
    )
    shown = {
        condition: under_none.model_copy(update={"vision_task": name, "example_policy": config.example_policy})
        for condition, name in SHOWN_TASKS.items()
    }
    return {**shown, NONE: under_none}


@dataclass(frozen=True)
class MeasureInContext(Stage[None]):
    """The stage: which map came out under each kind of pair, counted and sealed as ``in_context.json``."""

    split: Split
    shown: dict[str, ManifestRef]
    """What was generated under each kind of pair, and under "none": ``build_shown_configs`` says how."""
    dataset: Dataset

    @property
    def title(self) -> str:
        """The name shown to people."""
        return "in-context test"

    def identify(self) -> StageIdentity:
        """Return what was generated, and the maps and photographs that it is compared with."""
        shown = (StageInput.of(f"shown/{name}", ref) for name, ref in self.shown.items())
        inputs = (*shown, *self.dataset.list_inputs(SHOWN_TASKS))
        return StageIdentity(stage="in_context", version=VERSION, config={"split": self.split}, inputs=inputs)

    def run(self, context: Context[None]) -> ManifestRef:
        """Count, and seal the counts."""
        outputs = {name: read_generations(ref) for name, ref in self.shown.items()}
        sample_ids = outputs[NONE].sample_ids
        for name, generations in outputs.items():
            if generations.sample_ids != sample_ids:
                raise ValueError(
                    f"the images under {name!r} ({self.shown[name].uri}) answer other queries than those under {NONE!r}"
                )
        conditions: dict[str, str | None] = {condition: condition for condition in SHOWN_TASKS}
        truths = {
            name: read_truths(self.dataset, self.split, condition, sample_ids)
            for name, condition in (conditions | {NONE: None}).items()
        }
        result = count_confusion({name: generations.images for name, generations in outputs.items()}, truths)
        logger.info(
            "in context, with no text: %.1f %% of outputs are the map that the pair shows", 100 * result.accuracy
        )
        content = json.dumps(result.model_dump(), indent=2).encode()
        file = write_file(self.identity, context.store, IN_CONTEXT_FILE, content)
        return seal_manifest(self.identity, context.store, [file], counts={"rows": sum(map(sum, result.confusion))})


def read_in_context(in_context: ManifestRef) -> InContextResult:
    """Return the sealed confusion matrix."""
    return InContextResult.model_validate_json(open_manifest(in_context.uri).read_file(IN_CONTEXT_FILE))


def find_nearest(outputs: ImageArray, truths: Mapping[str, ImageArray]) -> npt.NDArray[np.int64]:
    """Return for each output (n,) the index of the truth that it is nearest to by RMSE; a tie goes to the first."""
    errors = np.stack([compute_image_errors(outputs, candidates) for candidates in truths.values()])
    nearest: npt.NDArray[np.int64] = errors.argmin(axis=0)
    return nearest


def count_confusion(outputs: Mapping[str, ImageArray], truths: Mapping[str, ImageArray]) -> InContextResult:
    """Return the confusion matrix of outputs by what was shown, against truths by what they are, of the same names."""
    labels = list(truths)
    if list(outputs) != labels:
        raise ValueError(f"outputs for {', '.join(outputs)} cannot be counted against truths for {', '.join(labels)}")
    confusion = [np.bincount(find_nearest(outputs[name], truths), minlength=len(labels)).tolist() for name in labels]
    with_pair = [(index, row) for index, (name, row) in enumerate(zip(labels, confusion, strict=True)) if name != NONE]
    num_right = sum(row[index] for index, row in with_pair)
    accuracy = num_right / sum(sum(row) for _, row in with_pair)
    return InContextResult(labels=labels, confusion=confusion, accuracy=accuracy)
