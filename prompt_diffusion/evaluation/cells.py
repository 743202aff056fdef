"""Stage "evaluate": one benchmark cell, a number for (method, vision task), beside its floor and the paper's.

Floors say how low a number can honestly be expected to go:
- Frechet distance: two sets of real images of the same size n, the truths against the first n images of another split.
- RMSE: the truths against their own round trip through the model's VAE, through which every output has to come.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from prompt_diffusion.data.records import SPLITS, Split
from prompt_diffusion.data.transforms import from_model_range, to_model_range
from prompt_diffusion.evaluation.config import EvalResources, Method
from prompt_diffusion.evaluation.features import WEIGHT_DIGESTS, ExtractorName, build_extractor
from prompt_diffusion.evaluation.frechet import compute_frechet_distance
from prompt_diffusion.evaluation.generate import find_map, open_data, read_images
from prompt_diffusion.evaluation.models import open_pipeline, reserve_device
from prompt_diffusion.evaluation.rmse import ImageArray, compute_rmse
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, find_sealed, open_manifest, seal_manifest, write_file
from prompt_diffusion.vision_tasks import find_vision_task

logger = logging.getLogger(__name__)

VERSION: Final = 1
CELL_FILE: Final = "cell.json"
MetricName = Literal["FID", "frechet_distance", "rmse"]

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
    """What is measured; FID only with Inception features."""
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
    return "FID" if extractor == "inception" else "frechet_distance"


def build_cell_config(method: Method, vision_task: str, extractor: ExtractorName) -> CellConfig:
    """Return the cell of a method and vision task; the extractor counts for map-to-image vision tasks alone."""
    used = extractor if find_vision_task(vision_task).direction == "map_to_image" else None
    return CellConfig(method=method, vision_task=vision_task, metric=name_metric(vision_task, used), extractor=used)


def identify_cell(
    config: CellConfig,
    generations: ManifestRef,
    model: ManifestRef,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
) -> StageIdentity:
    """Return what a cell is a function of."""
    condition = find_vision_task(config.vision_task).condition
    inputs = {
        "generations": generations.fingerprint,
        "model": model.fingerprint,
        "pairs": pairs.fingerprint,
        f"map:{condition}": find_map(maps, condition).fingerprint,
    }
    digest = WEIGHT_DIGESTS[config.extractor] if config.extractor else None
    content = {**config.model_dump(mode="json"), "extractor_weights": digest}
    return StageIdentity(stage="evaluate", version=VERSION, config=content, inputs=inputs)


def run_cell(
    config: CellConfig,
    generations: ManifestRef,
    model: ManifestRef,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
    store_root: str,
    resources: EvalResources,
) -> ManifestRef:
    """Measure one cell and seal it as cell.json; nothing is done where it is sealed."""
    identity = identify_cell(config, generations, model, pairs, maps)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    split = _check_generations(config, generations, model, pairs)
    images = read_images(generations)
    if config.extractor is not None:
        value, floor = _measure_frechet(config.extractor, images, pairs, maps, split, resources)
    else:
        value, floor = _measure_rmse(config.vision_task, images, model, pairs, maps, split, resources)
    paper = PAPER_VALUES.get((config.method, config.vision_task))
    cell = CellResult(**config.model_dump(), value=value, n=len(images), floor=floor, paper=paper)
    logger.info("%s, %s: %s %.4f (n %d, floor %.4f)", cell.method, cell.vision_task, cell.metric, value, cell.n, floor)
    file = write_file(identity, store_root, CELL_FILE, json.dumps(cell.model_dump(), indent=2).encode())
    return seal_manifest(identity, store_root, [file], counts={"rows": cell.n})


def read_cell(cell: ManifestRef) -> CellResult:
    """Return the number of a sealed cell."""
    return CellResult.model_validate_json(open_manifest(cell.uri).read_file(CELL_FILE))


def read_truths(
    pairs: ManifestRef, maps: Mapping[str, ManifestRef], split: Split, condition: str | None, n: int
) -> ImageArray:
    """Return the first n edited images of a split, or their maps of a condition: uint8 (n, h, w, 3)."""
    data = open_data(pairs, maps, split)
    return np.stack([data.image(row, "edited", condition) for row in range(n)])


@lru_cache(maxsize=4)
def find_floor_split(pairs: ManifestRef, split: Split, n: int) -> Split:
    """Return the split that the real-against-real floor takes its other n images from: validation, else train."""
    num_rows = Counter(open_manifest(pairs.uri).read_table(["split"])["split"].to_pylist())
    candidates: tuple[Split, ...] = ("validation", "train", "test")
    for other in candidates:
        if other != split and num_rows[other] >= n:
            return other
    raise ValueError(f"no other split than {split} has the {n} images that a real-against-real floor needs")


def _check_generations(config: CellConfig, generations: ManifestRef, model: ManifestRef, pairs: ManifestRef) -> Split:
    """Return the split that the images were generated for; ValueError where they are not what the cell is about."""
    identity = open_manifest(generations.uri).identity
    generated = identity.config["vision_task"]
    if generated != config.vision_task:
        raise ValueError(f"a cell of {config.vision_task} cannot be made from images of {generated}")
    for role, ref in (("model", model), ("pairs", pairs)):
        if identity.inputs[role] != ref.fingerprint:
            raise ValueError(f"the images were made with the {role} {identity.inputs[role]}, not {ref.fingerprint}")
    return next(split for split in SPLITS if split == identity.config["split"])


def _measure_frechet(
    extractor: ExtractorName,
    images: ImageArray,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
    split: Split,
    resources: EvalResources,
) -> tuple[float, float]:
    """Return the Frechet distance of the images to the truths, and the real-against-real floor at the same n."""
    others_split = find_floor_split(pairs, split, len(images))
    with reserve_device(resources):
        features = build_extractor(extractor, resources.cache_dir).extract(images)
        truths, others = (
            _extract_truths(extractor, pairs, tuple(sorted(maps.items())), name, len(images), resources.cache_dir)
            for name in (split, others_split)
        )
    return compute_frechet_distance(features, truths), compute_frechet_distance(others, truths)


# The three map-to-image vision tasks of every method share their truths and their floor's other images.
@lru_cache(maxsize=4)
def _extract_truths(
    extractor: ExtractorName,
    pairs: ManifestRef,
    maps: tuple[tuple[str, ManifestRef], ...],
    split: Split,
    n: int,
    cache_dir: Path,
) -> npt.NDArray[np.float64]:
    return build_extractor(extractor, cache_dir).extract(read_truths(pairs, dict(maps), split, None, n))


def _measure_rmse(
    vision_task: str,
    images: ImageArray,
    model: ManifestRef,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
    split: Split,
    resources: EvalResources,
) -> tuple[float, float]:
    """Return the RMSE of the maps, and of the truths' round trip through the model's VAE."""
    truths = read_truths(pairs, maps, split, find_vision_task(vision_task).target_condition, len(images))
    return compute_rmse(images, truths), compute_rmse(_round_trip(truths, model, resources), truths)


def _round_trip(images: ImageArray, model: ManifestRef, resources: EvalResources) -> ImageArray:
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
