"""The stage "annotate": condition maps of both images of every pair, one sealed manifest per annotator.

Its shards are aligned with the image pairs': shard by shard and row by row the same `sample_id`. The published
annotation makes maps of the input images only, and training then opens those of the edited ones; here both exist.

One call makes the whole stage (`run_annotate`), or many workers make shards of it (`make_annotation_shards`) and one
call seals what they report.
"""

import logging
from collections.abc import Iterable, Sequence

from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import EXACT, EXACT_VERSION, AnnotateConfig
from prompt_diffusion.annotators.shards import open_shard_maker, require_ingest
from prompt_diffusion.annotators.table import find_annotator
from prompt_diffusion.data.ingest import IngestConfig, build_native_source
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import Manifest, ManifestRef, find_sealed, open_manifest
from prompt_diffusion.store.records import MadeShard, OnProgress
from prompt_diffusion.store.sharded import ShardRows, make_shards, run_sharded_stage

logger = logging.getLogger(__name__)

VERSION = 1


def identify_annotate(config: AnnotateConfig, pairs: ManifestRef) -> StageIdentity:
    """Return what the maps depend on: condition, annotator, version, resolution, digest of the weights, the pairs."""
    inputs = {"pairs": pairs.fingerprint}
    version = EXACT_VERSION
    if config.annotator != EXACT:
        spec = find_annotator(config.annotator)
        version = spec.version
        digest = spec.choose_digest(config.weights_sha256)
        if digest:
            inputs["weights"] = digest
    content = {
        "condition": config.condition,
        "annotator": config.annotator,
        "annotator_version": version,
        "resolution": config.resolution,
    }
    return StageIdentity(stage="annotate", version=VERSION, config=content, inputs=inputs)


def run_annotate(
    config: AnnotateConfig,
    pairs: ManifestRef,
    store_root: str,
    resources: AnnotateResources,
    ingest: IngestConfig | None = None,
    made: Iterable[MadeShard] = (),
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Make the maps that are missing, seal, and return the reference; nothing is loaded where the stage is sealed.

    `ingest` says where the pairs came from: needed at resolution `native`. `made` are shards that
    `make_annotation_shards` reported. ValueError before any work where the weights cannot be had, the pairs have no
    exact maps, or the source is no longer what was ingested.
    """
    identity = identify_annotate(config, pairs)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    manifest = open_manifest(pairs.uri)
    known = list(made)
    if len(known) == len(manifest.shards):  # only to be sealed: no weights are needed
        return run_sharded_stage(identity, store_root, len(known), _refuse_to_make, made=known)
    if config.resolution == "native":
        check_source(manifest, ingest)
    logger.info("annotating %d pairs with %s (%s)", pairs.rows, config.annotator, config.condition)
    with open_shard_maker(config, manifest, store_root, resources, ingest) as make_shard:
        return run_sharded_stage(
            identity,
            store_root,
            len(manifest.shards),
            make_shard,
            made=known,
            num_at_once=resources.shards_at_once,
            on_progress=on_progress,
        )


def make_annotation_shards(
    config: AnnotateConfig,
    pairs: ManifestRef,
    store_root: str,
    resources: AnnotateResources,
    indices: Sequence[int],
    ingest: IngestConfig | None = None,
    on_progress: OnProgress | None = None,
) -> list[MadeShard]:
    """Find or make some shards of the stage, and seal nothing: one worker's part.

    Whoever hands out the parts has checked the source: each worker would list it again.
    """
    manifest, identity = open_manifest(pairs.uri), identify_annotate(config, pairs)
    with open_shard_maker(config, manifest, store_root, resources, ingest) as make_shard:
        return make_shards(
            identity,
            store_root,
            len(manifest.shards),
            make_shard,
            indices,
            num_at_once=resources.shards_at_once,
            on_progress=on_progress,
        )


def check_source(pairs: Manifest, ingest: IngestConfig | None) -> None:
    """Raise ValueError where the source that lies there now is not the one that the pairs were made from."""
    digest = build_native_source(require_ingest(ingest)).digest()
    if digest != pairs.identity.inputs["source"]:
        raise ValueError(
            f"the source of {pairs.ref.uri} has changed: its digest is {digest}, it was ingested with "
            f"{pairs.identity.inputs['source']}"
        )


def _refuse_to_make(index: int) -> ShardRows:
    raise AssertionError(f"shard {index} was reported as made")
