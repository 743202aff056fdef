"""The stage "annotate": condition maps of both images of every pair, one sealed manifest per annotator.

Its shards are aligned with the image pairs': shard by shard and row by row the same `sample_id`. The published
annotation makes maps of the input images only, and training then opens those of the edited ones; here both exist.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prompt_diffusion.annotators.base import AnnotateResources, Annotator, Condition, ImageBatch
from prompt_diffusion.annotators.table import build_annotator, find_annotator
from prompt_diffusion.data.records import condition_maps_table
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import Manifest, ManifestRef, find_sealed, open_manifest
from prompt_diffusion.store.sharded import ShardRows, run_sharded_stage

logger = logging.getLogger(__name__)

VERSION = 1
EXACT = "exact"
EXACT_VERSION = 1

Progress = Callable[[int, int, int], None]
MakeShard = Callable[[int], ShardRows]


class AnnotateConfig(BaseModel):
    """Which condition map is made, and by what."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    condition: Condition
    """The kind of map."""
    annotator: str = EXACT
    """A name in the table of annotators, or `exact`: the maps that the pairs bring with them."""
    weights_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The sha256 of other weights for the same network; None demands the published ones."""

    @model_validator(mode="after")
    def _check_annotator(self) -> "AnnotateConfig":
        if self.annotator == EXACT:
            if self.weights_sha256 is not None:
                raise ValueError(
                    f"annotator 'exact' has no weights, so weights_sha256 {self.weights_sha256} fits nothing"
                )
            return self
        spec = find_annotator(self.annotator)
        if spec.condition != self.condition:
            raise ValueError(f"annotator {self.annotator!r} makes {spec.condition} maps, not {self.condition} maps")
        spec.choose_digest(self.weights_sha256)
        return self


def identify_annotate(config: AnnotateConfig, pairs: ManifestRef) -> StageIdentity:
    """Return what the maps depend on: condition, annotator and its version, digest of its weights, the pairs."""
    inputs = {"pairs": pairs.fingerprint}
    version = EXACT_VERSION
    if config.annotator != EXACT:
        spec = find_annotator(config.annotator)
        version = spec.version
        digest = spec.choose_digest(config.weights_sha256)
        if digest:
            inputs["weights"] = digest
    content = {"condition": config.condition, "annotator": config.annotator, "annotator_version": version}
    return StageIdentity(stage="annotate", version=VERSION, config=content, inputs=inputs)


def run_annotate(
    config: AnnotateConfig,
    pairs: ManifestRef,
    store_root: str,
    resources: AnnotateResources,
    on_progress: Progress | None = None,
) -> ManifestRef:
    """Make the maps that are missing, seal, and return the reference; nothing is loaded where the stage is sealed.

    `on_progress` hears (shards done, shards, rows so far). ValueError before any work where the weights cannot be had
    or the pairs have no exact maps.
    """
    identity = identify_annotate(config, pairs)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    manifest = open_manifest(pairs.uri)
    if config.annotator == EXACT:
        make_shard = _copying(manifest, config.condition)
    else:
        annotator = build_annotator(config.annotator, resources, config.weights_sha256)
        make_shard = _annotating(manifest, annotator, resources.batch_size)
    logger.info("annotating %d pairs with %s (%s)", pairs.rows, config.annotator, config.condition)
    return run_sharded_stage(identity, store_root, len(manifest.shards), make_shard, on_progress=on_progress)


def annotate_images(annotator: Annotator, images: Iterable[ImageBatch], batch_size: int) -> Iterator[ImageBatch]:
    """Yield the map H,W,3 of each image H,W,3, in order; a batch holds images of one shape, at most `batch_size`."""
    for shape, same_shape in groupby(images, key=lambda image: image.shape):
        while batch := [image for _, image in zip(range(batch_size), same_shape, strict=False)]:
            maps = annotator.annotate(np.stack(batch))
            assert maps.shape == (len(batch), *shape), f"{annotator.name} made {maps.shape} of {len(batch)} x {shape}"
            yield from maps


def _annotating(manifest: Manifest, annotator: Annotator, batch_size: int) -> MakeShard:
    def make_shard(index: int) -> ShardRows:
        columns = ["sample_id", "input_image", "edited_image"]
        table = manifest.read_shard(manifest.shards[index], columns=columns)
        maps = [encode_png(map_) for map_ in annotate_images(annotator, _decode_images(table), batch_size)]
        return condition_maps_table(table.column("sample_id").to_pylist(), maps[0::2], maps[1::2]), []

    return make_shard


def _decode_images(table: pa.Table) -> Iterator[ImageBatch]:
    """Yield the input image, then the edited one, of each row; decoded only when the batch wants them."""
    for batch in table.to_batches(max_chunksize=1):
        for row in batch.to_pylist():
            for column in ("input_image", "edited_image"):
                try:
                    yield decode_image(row[column]["bytes"])
                except ValueError as error:  # ingestion lets none through: dropping a row here would break alignment
                    raise ValueError(f"the {column} of {row['sample_id']} cannot be annotated: {error}") from error


def _copying(manifest: Manifest, condition: str) -> MakeShard:
    def make_shard(index: int) -> ShardRows:
        table = manifest.read_shard(manifest.shards[index], columns=["sample_id", "exact_maps"])
        sample_ids = table.column("sample_id").to_pylist()
        found = []
        for sample_id, maps in zip(sample_ids, table.column("exact_maps").to_pylist(), strict=True):
            by_condition = {entry["condition"]: entry for entry in maps or []}
            if condition not in by_condition:
                raise ValueError(_no_exact_map(manifest, condition, sample_id, list(by_condition)))
            found.append(by_condition[condition])
        input_maps = [entry["input_map"]["bytes"] for entry in found]
        return condition_maps_table(sample_ids, input_maps, [entry["edited_map"]["bytes"] for entry in found]), []

    return make_shard


def _no_exact_map(manifest: Manifest, condition: str, sample_id: str, present: list[str]) -> str:
    source = manifest.identity.config.get("source")
    kind = source.get("kind") if isinstance(source, dict) else None
    known = ", ".join(sorted(present)) or "none at all"
    return (
        f"the source {kind or manifest.ref.uri!r} has no exact {condition!r} map for {sample_id} (it has {known}): "
        "choose an annotator by name"
    )
