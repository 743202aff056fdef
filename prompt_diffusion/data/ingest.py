"""The stage `ingest`: any source in, image pairs at the training resolution out, split by prompt group."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, model_validator

from prompt_diffusion.data.records import SPLITS, ImagePair, Split, image_pairs_table
from prompt_diffusion.data.sources.base import SampleKey, Source
from prompt_diffusion.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig, open_instruct_pix2pix
from prompt_diffusion.data.sources.photos import PhotosConfig, PhotosSource
from prompt_diffusion.data.sources.scenes import ScenesConfig, ScenesSource
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.records import Reject
from prompt_diffusion.store.sharded import MakeShard, ShardRows
from prompt_diffusion.store.stage import Context, ShardedStage

logger = logging.getLogger(__name__)

STAGE, VERSION = "ingest", 4

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


@dataclass(frozen=True)
class Ingest(ShardedStage[None]):
    """The stage: a source read into shards of image pairs.

    ValueError where the source is not what it claims to be, has no sample, or more of it is broken than the budget.
    """

    config: IngestConfig

    @cached_property
    def source(self) -> Source:
        """The source, opened once: its listing may be long."""
        return build_source(self.config)

    @cached_property
    def keys(self) -> list[SampleKey]:
        """Every sample of the source with its split."""
        return assign_splits(self.source.plan(), self.config.split_fractions)

    @property
    def reject_budget(self) -> float:
        """The configured one."""
        return self.config.reject_budget

    @property
    def title(self) -> str:
        """What people call it."""
        return f"ingest {self.config.source.kind}"

    def identify(self) -> StageIdentity:
        """Return the scientific fields and the source's content, wherever it lies."""
        fields = self.config.model_dump(mode="json", exclude={"reject_budget", "source"})
        content = {**fields, "source": self.config.source.list_scientific()}
        inputs = (StageInput(role="source", fingerprint=self.source.digest()),)
        return StageIdentity(stage=STAGE, version=VERSION, config=content, inputs=inputs)

    def count_shards(self) -> int:
        """Return the shards that the samples fill; ValueError for a source that has none."""
        if not self.keys:
            raise ValueError(f"the source {self.config.source.kind} has no samples")
        return math.ceil(len(self.keys) / self.config.shard_rows)

    @contextmanager
    def open_maker(self, context: Context[None]) -> Iterator[MakeShard]:
        """Give what reads a shard's samples."""
        keys, rows = self.keys, self.config.shard_rows
        logger.info(
            "ingest of %d samples from %s into %s", len(keys), self.config.source.kind, self.identity.uri(context.store)
        )

        def make_shard(index: int) -> ShardRows:
            places = range(index * rows, min((index + 1) * rows, len(keys)))
            pairs: list[ImagePair] = []
            rejects: list[Reject] = []
            for item in self.source.read([keys[place] for place in places]):
                if isinstance(item, Reject):
                    rejects.append(item)
                else:
                    pairs.append(item)
            assert len(pairs) + len(rejects) == len(places), "a source answers every key"
            return image_pairs_table(pairs), rejects

        yield make_shard


def assign_splits(keys: Sequence[SampleKey], fractions: tuple[float, float, float]) -> list[SampleKey]:
    """Return the keys with their splits: whole prompt groups, in the order in which they first appear, not shuffled.

    The first floor(train * G) of G groups are for training, those up to floor((train + validation) * G) for validation.
    Where the source publishes splits, those stand, and its training groups give what is not published. ValueError where a
    group stands in two of them, or none is for training.
    """
    published = _find_published(keys)
    shares = {
        name: share
        for name, share in zip(SPLITS, fractions, strict=True)
        if name == "train" or name not in published.values()
    }
    total = sum(shares.values()) if len(shares) < len(SPLITS) else 1.0
    names = list(shares)
    # What is published for validation or test stays there; the rest is divided among the splits that nothing is published for.
    groups = {key.group_id: None for key in keys if published.get(key.group_id, "train") == "train"}
    if not groups and keys:
        raise ValueError(
            f"no sample is published for training, only for {' and '.join(sorted(set(published.values())))}: "
            "set ingest.source.published_splits to 'ignore' to split them anew"
        )
    # The addend keeps 0.9 * 10 at 9 where binary fractions fall short of it.
    ends = [
        math.floor(sum(list(shares.values())[: place + 1]) / (total or 1.0) * len(groups) + 1e-9)
        for place in range(len(names) - 1)
    ]
    splits = {group: names[sum(place >= end for end in ends)] for place, group in enumerate(groups)}
    return [replace(key, split=splits.get(key.group_id) or published[key.group_id]) for key in keys]


def _find_published(keys: Sequence[SampleKey]) -> dict[str, Split]:
    """Return the published split of each prompt group that has one; ValueError for a group that stands in two."""
    published: dict[str, Split] = {}
    for key in keys:
        if key.published is None or key.reject:
            continue
        first = published.setdefault(key.group_id, key.published)
        if first != key.published:
            raise ValueError(
                f"prompt group {key.group_id!r} stands in two published splits, {first} and {key.published}, so that the "
                "model would be tested on what it was trained on: correct the source, or set ingest.source.published_splits to "
                "'ignore' to split all groups anew"
            )
    return published
