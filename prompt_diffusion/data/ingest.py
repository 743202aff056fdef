"""The stage `ingest`: any source in, image pairs at the training resolution out, split by prompt group."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from prompt_diffusion.data.records import SPLITS, ImagePair, Split, image_pairs_table
from prompt_diffusion.data.sources.base import SampleKey, Source
from prompt_diffusion.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig, open_instruct_pix2pix
from prompt_diffusion.data.sources.photos import PhotosConfig, PhotosSource
from prompt_diffusion.data.sources.scenes import ScenesConfig, ScenesSource
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, Reject, find_sealed
from prompt_diffusion.store.records import OnProgress
from prompt_diffusion.store.sharded import ShardRows, run_sharded_stage

logger = logging.getLogger(__name__)

STAGE, VERSION = "ingest", 2

SourceConfig = Annotated[
    ScenesConfig | PhotosConfig | ImageFolderConfig | InstructPix2PixConfig, Field(discriminator="kind")
]
_SOURCES: dict[str, Callable[[Any, int], Source]] = {
    "scenes": ScenesSource,
    "photos": PhotosSource,
    "image_folder": ImageFolderSource,
    "instruct_pix2pix": open_instruct_pix2pix,
}
_NATIVE_SOURCES: dict[str, Callable[[Any, None], Source]] = {
    "image_folder": ImageFolderSource,
    "instruct_pix2pix": open_instruct_pix2pix,
}


SOURCE_LICENCES: dict[str, str] = {
    "scenes": "Apache-2.0 (drawn by this project's code)",
    "photos": "several: those of the photographs that scikit-image and scikit-learn ship, as these packages list them",
    "image_folder": "unknown (a user's own images)",
    "instruct_pix2pix": "unknown (its code is MIT, its images were made with Stable Diffusion, CreativeML OpenRAIL-M)",
}
"""The licence of the images, by the kind of their source."""


class IngestConfig(FrozenModel):
    """What is read, at which resolution, and how it is split."""

    source: SourceConfig = ScenesConfig()
    """Where the image pairs come from."""
    image_size: int = Field(default=64, ge=16, le=2048)
    """The training resolution in pixels: a centre square, resized once by Lanczos."""
    split_fractions: tuple[float, float, float] = (0.90, 0.05, 0.05)
    """Train, validation and test: shares of the prompt groups, in source order."""
    shard_rows: int = Field(default=256, ge=1, le=1_000_000)
    """Samples a shard. It shapes the files, so it belongs to their identity."""
    reject_budget: float = Field(default=0.01, ge=0.0, le=1.0)
    """The share of samples that may be rejected before the stage fails. Not part of the identity."""

    @model_validator(mode="after")
    def _check_fractions(self) -> "IngestConfig":
        if min(self.split_fractions) < 0 or abs(sum(self.split_fractions) - 1.0) > 1e-9:
            raise ValueError(f"split_fractions must be at least 0 and sum to 1, got {self.split_fractions}")
        return self


def build_source(config: IngestConfig) -> Source:
    """Return the source that the configuration names; ValueError where it is not what is claimed."""
    return _SOURCES[config.source.kind](config.source, config.image_size)


def build_native_source(config: IngestConfig) -> Source:
    """Return the same source with its image files as they are, not resized; ValueError where it has no files."""
    if config.source.kind not in _NATIVE_SOURCES:
        raise ValueError(
            f"the source {config.source.kind} has no image files of its own resolution: annotate at resolution 'training'"
        )
    return _NATIVE_SOURCES[config.source.kind](config.source, None)


def identify_ingest(config: IngestConfig) -> StageIdentity:
    """Return what determines the ingested pairs: the scientific fields and the source's content, wherever it lies."""
    return _identify(config, build_source(config))


def _identify(config: IngestConfig, source: Source) -> StageIdentity:
    fields = config.model_dump(mode="json", exclude={"reject_budget", "source"})
    content = {**fields, "source": config.source.list_scientific()}
    return StageIdentity(stage=STAGE, version=VERSION, config=content, inputs={"source": source.digest()})


def run_ingest(config: IngestConfig, store_root: str, on_progress: OnProgress | None = None) -> ManifestRef:
    """Ingest the source into shards of image pairs and seal them; at once if they are sealed already.

    ValueError where the source is not what it claims to be, has no sample, or more of it is broken than the budget.
    """
    source = build_source(config)
    identity = _identify(config, source)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    keys = assign_splits(source.plan(), config.split_fractions)
    if not keys:
        raise ValueError(f"the source {config.source.kind} has no samples")
    repeated = _find_repeated(keys)
    logger.info("ingest of %d samples from %s into %s", len(keys), config.source.kind, identity.uri(store_root))

    def make_shard(index: int) -> ShardRows:
        places = range(index * config.shard_rows, min((index + 1) * config.shard_rows, len(keys)))
        found = source.read([keys[place] for place in places if place not in repeated])
        pairs: list[ImagePair] = []
        rejects = [Reject(sample_id=keys[p].sample_id, reason="it is listed twice") for p in places if p in repeated]
        for item in found:
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                pairs.append(item)
        assert len(pairs) + len(rejects) == len(places), "a source answers every key"
        return image_pairs_table(pairs), rejects

    return run_sharded_stage(
        identity,
        store_root,
        math.ceil(len(keys) / config.shard_rows),
        make_shard,
        reject_budget=config.reject_budget,
        on_progress=on_progress,
    )


def assign_splits(keys: Sequence[SampleKey], fractions: tuple[float, float, float]) -> list[SampleKey]:
    """Return the keys with their splits: whole prompt groups, in the order in which they first appear, not shuffled.

    The first floor(train * G) of G groups are for training, those up to floor((train + validation) * G) for validation.
    """
    groups = {key.group_id: None for key in keys}
    # The addend keeps 0.9 * 10 at 9 where binary fractions fall short of it.
    ends = [math.floor(sum(fractions[: place + 1]) * len(groups) + 1e-9) for place in range(2)]
    splits: dict[str, Split] = {group: SPLITS[sum(place >= end for end in ends)] for place, group in enumerate(groups)}
    return [replace(key, split=splits[key.group_id]) for key in keys]


def _find_repeated(keys: Sequence[SampleKey]) -> frozenset[int]:
    """Return the places of the keys whose sample_id an earlier key has."""
    seen: set[str] = set()
    repeated = set()
    for place, key in enumerate(keys):
        if key.sample_id in seen:
            repeated.add(place)
        seen.add(key.sample_id)
    return frozenset(repeated)
