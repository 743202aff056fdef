"""Stage "evaluate": one benchmark cell, a number for (method, vision task), beside its floor and the paper's.

Floors say how low a number can honestly be expected to go:
- Frechet distance: two sets of real images of the same size n, the truths against the first n images of another split.
- RMSE: the truths against their own round trip through the model's VAE, through which every output has to come.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.records import SPLITS, Split
from prompt_diffusion.data.transforms import from_model_range, to_model_range
from prompt_diffusion.evaluation.config import EvaluateResources, Method
from prompt_diffusion.evaluation.features import WEIGHT_DIGESTS, ExtractorName, build_extractor
from prompt_diffusion.evaluation.frechet import compute_frechet_distance
from prompt_diffusion.evaluation.generate import Generations, check_makers, open_data, read_generations
from prompt_diffusion.evaluation.models import open_pipeline, reserve_device
from prompt_diffusion.evaluation.rmse import ImageArray, compute_rmse
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.vision_tasks import find_vision_task

logger = logging.getLogger(__name__)

VERSION: Final = 2
CELL_FILE: Final = "cell.json"
MetricName = Literal["FID", "FID_legacy", "frechet_distance", "rmse"]

# Table 1 of arXiv 2305.01115: FID (Inception, 10,000 images of 256 pixels) or RMSE, by method and vision task.
PAPER_VALUES: Final[Mapping[tuple[Method, str], float]] = {
    ("CN(FT)", "depth_to_image"): 19.81,
    ("CN(FT)", "hed_to_image"): 13.07,
    ("CN(FT)", "seg_to_image"): 20.71,
    ("CN(FT)", "image_to_depth"): 0.20,
    ("CN(FT)", "image_to_hed"): 0.18,
    ("CN(FT)", "image_to_seg"): 0.36,
    ("Prompt Diffusion", "depth_to_image"): 18.60,
    ("Prompt Diffusion", "hed_to_image"): 13.35,
    ("Prompt Diffusion", "seg_to_image"): 19.46,
    ("Prompt Diffusion", "image_to_depth"): 0.21,
    ("Prompt Diffusion", "image_to_hed"): 0.14,
    ("Prompt Diffusion", "image_to_seg"): 0.31,
}


class CellConfig(FrozenModel):
    """Which number a cell is."""

    method: Method
    """Whose outputs are measured."""
    vision_task: str
    """The vision task."""
    metric: MetricName
    """What is measured; FID only with Inception features, and FID_legacy where the network resizes the images itself."""
    extractor: ExtractorName | None
    """The features of a Frechet distance; None for RMSE."""

    @model_validator(mode="after")
    def _check_name_of_metric(self) -> Self:
        if self.metric != name_metric(self.vision_task, self.extractor):
            raise ValueError(f"{self.vision_task} with the extractor {self.extractor} is not called {self.metric!r}")
        return self


class CellResult(CellConfig):
    """One cell of the table."""

    value: float = Field(ge=0.0, allow_inf_nan=False)
    """The number; lower is better."""
    n: int = Field(ge=1)
    """How many images it was made from."""
    floor: float = Field(ge=0.0, allow_inf_nan=False)
    """What the same measure gives without a generator: real against real, or the VAE's round trip."""
    paper: float | None
    """The paper's number for the same cell; None for vision tasks it does not have."""


def name_metric(vision_task: str, extractor: ExtractorName | None) -> MetricName:
    """Return what a cell's number is called: image to map has no extractor, and only Inception makes an FID."""
    is_map_to_image = find_vision_task(vision_task).direction == "map_to_image"
    if is_map_to_image != (extractor is not None):
        raise ValueError(f"{vision_task} cannot be measured with the extractor {extractor}")
    if extractor is None:
        return "rmse"
    names: dict[ExtractorName, MetricName] = {"inception": "FID", "inception_legacy": "FID_legacy"}
    return names.get(extractor, "frechet_distance")


def build_cell_config(method: Method, vision_task: str, extractor: ExtractorName) -> CellConfig:
    """Return the cell of a method and vision task; the extractor counts for map-to-image vision tasks alone."""
    used = extractor if find_vision_task(vision_task).direction == "map_to_image" else None
    return CellConfig(method=method, vision_task=vision_task, metric=name_metric(vision_task, used), extractor=used)


@dataclass(frozen=True)
class MeasureCell(Stage[EvaluateResources]):
    """The stage: generated images turned into one number, sealed as ``cell.json``.

    ValueError where the images were not made for that vision task, by that model, from that dataset.
    """

    config: CellConfig
    generations: ManifestRef
    model: ManifestRef
    dataset: Dataset

    @property
    def title(self) -> str:
        """The name shown to people."""
        return f"measure {self.config.metric} of {self.config.method}, {self.config.vision_task}"

    def identify(self) -> StageIdentity:
        """Return which number it is, the extractor's weights, the images, the model and what they are compared with."""
        condition = find_vision_task(self.config.vision_task).condition
        inputs = (
            StageInput.of("generations", self.generations),
            StageInput.of("model", self.model),
            *self.dataset.list_inputs([condition]),
        )
        digest = WEIGHT_DIGESTS[self.config.extractor] if self.config.extractor else None
        content = {**self.config.model_dump(mode="json"), "extractor_weights": digest}
        return StageIdentity(stage="evaluate", version=VERSION, config=content, inputs=inputs)

    def run(self, context: Context[EvaluateResources]) -> ManifestRef:
        """Measure, and seal the number."""
        config, split = self.config, self._check_generations()
        outputs = read_generations(self.generations)
        if config.extractor is not None:
            value, floor = self._measure_frechet(config.extractor, outputs, split, context.resources)
        else:
            value, floor = self._measure_rmse(outputs, split, context.resources)
        paper = PAPER_VALUES.get((config.method, config.vision_task))
        cell = CellResult(**config.model_dump(), value=value, n=len(outputs), floor=floor, paper=paper)
        logger.info(
            "%s, %s: %s %.4f (n %d, floor %.4f)", cell.method, cell.vision_task, cell.metric, value, cell.n, floor
        )
        file = write_file(self.identity, context.store, CELL_FILE, json.dumps(cell.model_dump(), indent=2).encode())
        return seal_manifest(self.identity, context.store, [file], counts={"rows": cell.n})

    def _check_generations(self) -> Split:
        """Return the split that the images were generated for; ValueError where they are not what the cell is about."""
        identity = open_manifest(self.generations.uri).identity
        generated = identity.config["vision_task"]
        if generated != self.config.vision_task:
            raise ValueError(f"a cell of {self.config.vision_task} cannot be made from images of {generated}")
        check_makers(identity, self.model, self.dataset.pairs)
        return next(split for split in SPLITS if split == identity.config["split"])

    def _measure_frechet(
        self, extractor: ExtractorName, outputs: Generations, split: Split, resources: EvaluateResources
    ) -> tuple[float, float]:
        """Return the Frechet distance of the images to the truths, and the real-against-real floor at the same n."""
        others_split = find_floor_split(self.dataset.pairs, split, len(outputs))
        others = open_data(self.dataset, others_split).sample_ids[: len(outputs)]
        cache_dir = resources.find_cache()
        with reserve_device(resources) as device:
            extract = build_extractor(extractor, cache_dir, str(device)).extract
            features = extract(outputs.images)
            truths, real = (
                _extract_truths(extractor, self.dataset.model_dump_json(), name, tuple(ids), cache_dir, str(device))
                for name, ids in ((split, outputs.sample_ids), (others_split, others))
            )
        return compute_frechet_distance(features, truths), compute_frechet_distance(real, truths)

    def _measure_rmse(self, outputs: Generations, split: Split, resources: EvaluateResources) -> tuple[float, float]:
        """Return the RMSE of the maps, and of the truths' round trip through the model's VAE."""
        condition = find_vision_task(self.config.vision_task).target_condition
        truths = read_truths(self.dataset, split, condition, outputs.sample_ids)
        round_trip = round_trip_images(truths, self.model, resources)
        return compute_rmse(outputs.images, truths), compute_rmse(round_trip, truths)


def read_cell(cell: ManifestRef) -> CellResult:
    """Return the number of a sealed cell."""
    return CellResult.model_validate_json(open_manifest(cell.uri).read_file(CELL_FILE))


def read_truths(dataset: Dataset, split: Split, condition: str | None, sample_ids: Sequence[str]) -> ImageArray:
    """Return the edited images of those samples, or their maps of a condition: uint8 (n, h, w, 3), in their order.

    ValueError names a sample that the split does not have.
    """
    data = open_data(dataset, split)
    return np.stack([data.image(row, "edited", condition) for row in data.find_rows(sample_ids)])


@lru_cache(maxsize=4)
def find_floor_split(pairs: ManifestRef, split: Split, n: int) -> Split:
    """Return the split that the real-against-real floor takes its other n images from: validation, else train."""
    num_rows = Counter(open_manifest(pairs.uri).read_table(["split"])["split"].to_pylist())
    candidates: tuple[Split, ...] = ("validation", "train", "test")
    for other in candidates:
        if other != split and num_rows[other] >= n:
            return other
    raise ValueError(f"no other split than {split} has the {n} images that a real-against-real floor needs")


# The three map-to-image vision tasks of every method share their truths and their floor's other images.
@lru_cache(maxsize=4)
def _extract_truths(
    extractor: ExtractorName, dataset: str, split: Split, sample_ids: tuple[str, ...], cache_dir: Path, device: str
) -> npt.NDArray[np.float64]:
    """Return the features of photographs; the dataset as JSON, which can be a key."""
    truths = read_truths(Dataset.model_validate_json(dataset), split, None, sample_ids)
    return build_extractor(extractor, cache_dir, device).extract(truths)


def round_trip_images(images: ImageArray, model: ManifestRef, resources: EvaluateResources) -> ImageArray:
    """Return the images encoded and decoded by the model's VAE, at the posterior's mean."""
    import torch

    rows = []
    with open_pipeline(model, resources) as pipeline, torch.inference_mode():
        for start in range(0, len(images), resources.batch_size):
            pixels = to_model_range(images[start : start + resources.batch_size])
            pixels = pixels.to(device=pipeline.vae.device, dtype=pipeline.vae.dtype)
            latents = pipeline.vae.encode(pixels).latent_dist.mode()
            rows.append(from_model_range(pipeline.vae.decode(latents).sample))
    return np.concatenate(rows)
