"""Stage "in_context": does the example pair alone decide which map comes out?

The same queries, with no text, no guidance and the same noise, are generated under an example pair of each image-to-map
vision task and under none. An output counts as the one of {each condition's true map, the photograph} that it is
nearest to by RMSE. A model that reads the pair puts every output of a row under the row's own condition.
"""

import json
import logging
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prompt_diffusion.evaluation.cells import read_truths
from prompt_diffusion.evaluation.config import EvalResources, EvaluateConfig
from prompt_diffusion.evaluation.generate import GenerateConfig, find_map, identify_generate, read_images, run_generate
from prompt_diffusion.evaluation.rmse import ImageArray, compute_image_errors
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, find_sealed, open_manifest, seal_manifest, write_file
from prompt_diffusion.store.records import OnProgress
from prompt_diffusion.vision_tasks import VISION_TASKS

logger = logging.getLogger(__name__)

VERSION: Final = 1
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


def identify_in_context(
    config: EvaluateConfig, model: ManifestRef, pairs: ManifestRef, maps: Mapping[str, ManifestRef]
) -> StageIdentity:
    """Return what the confusion matrix is a function of."""
    shown = {
        f"shown:{name}": identify_generate(shown_config, model, pairs, maps).fingerprint
        for name, shown_config in build_shown_configs(config).items()
    }
    map_inputs = {f"map:{condition}": find_map(maps, condition).fingerprint for condition in SHOWN_TASKS}
    inputs = {**shown, **map_inputs, "pairs": pairs.fingerprint}
    return StageIdentity(stage="in_context", version=VERSION, config={"split": config.split}, inputs=inputs)


def run_in_context(
    config: EvaluateConfig,
    model: ManifestRef,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
    store_root: str,
    resources: EvalResources,
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Generate under every kind of pair, say which map came out, and seal the counts as in_context.json."""
    identity = identify_in_context(config, model, pairs, maps)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    outputs = {
        name: read_images(run_generate(shown, model, pairs, maps, store_root, resources, on_progress))
        for name, shown in build_shown_configs(config).items()
    }
    n = config.num_in_context
    truths = {condition: read_truths(pairs, maps, config.split, condition, n) for condition in SHOWN_TASKS}
    truths[NONE] = read_truths(pairs, maps, config.split, None, n)
    result = count_confusion(outputs, truths)
    logger.info("in context, with no text: %.1f %% of outputs are the map that the pair shows", 100 * result.accuracy)
    file = write_file(identity, store_root, IN_CONTEXT_FILE, json.dumps(result.model_dump(), indent=2).encode())
    return seal_manifest(identity, store_root, [file], counts={"rows": sum(map(sum, result.confusion))})


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
