"""What one shard of condition maps is made from: the pairs' own maps, the pairs' images, or the source's own files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import pyarrow as pa

from prompt_diffusion.annotators.base import AnnotateResources, Annotator
from prompt_diffusion.annotators.config import EXACT, AnnotateConfig
from prompt_diffusion.annotators.streaming import MapMaker
from prompt_diffusion.annotators.table import build_from_spec, find_annotator
from prompt_diffusion.data.ingest import IngestConfig, build_native_source
from prompt_diffusion.data.records import ImagePair, condition_maps_table
from prompt_diffusion.store.manifest import Manifest
from prompt_diffusion.store.sharded import MakeShard, ShardRows
from prompt_diffusion.store.uris import join_uri

MIRROR = "weights"
"""The store's folder of weights, which ``prompt-diffusion weights mirror`` fills."""


@contextmanager
def open_shard_maker(
    config: AnnotateConfig,
    manifest: Manifest,
    store_root: str,
    resources: AnnotateResources,
    ingest: IngestConfig | None,
) -> Iterator[MakeShard]:
    """Yield the function that makes a shard."""
    if config.annotator == EXACT:
        yield _copying(manifest, config.condition)
        return
    is_native = config.resolution == "native"
    read_files = _reading_source(manifest, require_ingest(ingest)) if is_native else _reading_pairs(manifest)
    size = int(manifest.identity.config["image_size"]) if is_native else None
    mirror = resources.weights_mirror or join_uri(store_root, MIRROR)
    places = resources.model_copy(update={"weights_mirror": mirror})
    spec = find_annotator(config.annotator)

    def load() -> Annotator:
        return _load_annotator(spec, spec.choose_digest(config.weights_sha256), places)

    with MapMaker.open(load, resources) as maker:

        def make_shard(index: int) -> ShardRows:
            sample_ids, files = read_files(index)
            maps = list(maker.make_maps(files, size))
            return condition_maps_table(sample_ids, maps[0::2], maps[1::2]), []

        yield make_shard


# A worker makes many parts, and loads the weights once.
_load_annotator = lru_cache(maxsize=4)(build_from_spec)

ReadFiles = Callable[[int], tuple[list[str], Iterator[bytes]]]


def _reading_pairs(manifest: Manifest) -> ReadFiles:
    """Return a reader of a shard's sample ids and, for each row, its input image, then its edited one."""

    def read_files(index: int) -> tuple[list[str], Iterator[bytes]]:
        table = manifest.read_shard(manifest.shards[index], columns=["sample_id", "input_image", "edited_image"])
        return table["sample_id"].to_pylist(), _list_images(table)

    return read_files


def _list_images(table: pa.Table) -> Iterator[bytes]:
    for batch in table.to_batches(max_chunksize=1):
        for row in batch.to_pylist():
            yield row["input_image"]["bytes"]
            yield row["edited_image"]["bytes"]


def _reading_source(manifest: Manifest, ingest: IngestConfig) -> ReadFiles:
    """Return the same reader on the source's own files, at their own resolution."""
    source = build_native_source(ingest)
    keys = {key.sample_id: key for key in source.plan() if not key.reject}

    def read_files(index: int) -> tuple[list[str], Iterator[bytes]]:
        sample_ids = manifest.read_shard(manifest.shards[index], columns=["sample_id"])["sample_id"].to_pylist()

        def list_files() -> Iterator[bytes]:
            for item in source.read([keys[sample_id] for sample_id in sample_ids]):
                if not isinstance(item, ImagePair):  # ingestion accepted it: dropping it here would break alignment
                    raise ValueError(f"{item.sample_id} was ingested and cannot be read any more: {item.reason}")
                yield item.input_image
                yield item.edited_image

        return sample_ids, list_files()

    return read_files


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


def require_ingest(ingest: IngestConfig | None) -> IngestConfig:
    """Return where the pairs came from; ValueError where the stage does not say."""
    if ingest is None:
        raise ValueError("resolution 'native' annotates the source's own images: say where they are (ingest)")
    return ingest
