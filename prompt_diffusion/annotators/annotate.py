"""The stage "annotate": condition maps of both images of every pair, one sealed manifest per annotator.

Its shards are aligned with the image pairs': shard by shard and row by row the same `sample_id`. The published
annotation makes maps of the input images only, and training then opens those of the edited ones; here both exist.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import EXACT, EXACT_VERSION, AnnotateConfig
from prompt_diffusion.annotators.shards import open_shard_maker, require_ingest
from prompt_diffusion.annotators.table import find_annotator
from prompt_diffusion.data.ingest import IngestConfig, build_native_source
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import Manifest, ManifestRef, open_manifest
from prompt_diffusion.store.sharded import MakeShard
from prompt_diffusion.store.stage import Context, ShardedStage

logger = logging.getLogger(__name__)

VERSION = 2


@dataclass(frozen=True)
class Annotate(ShardedStage[AnnotateResources]):
    """The stage: one annotator's maps of some image pairs.

    ValueError before any work where the weights cannot be had, the pairs have no exact maps, or the source is no longer
    what was ingested.
    """

    config: AnnotateConfig
    pairs: ManifestRef
    ingest: IngestConfig | None = None
    """Where the pairs came from: needed at resolution `native`, where the source's own files are read; no part of the
    identity, since the pairs are."""

    @cached_property
    def manifest(self) -> Manifest:
        """The image pairs."""
        return open_manifest(self.pairs.uri)

    @property
    def title(self) -> str:
        """What people call it."""
        return f"annotate {self.config.condition} with {self.config.annotator}"

    def identify(self) -> StageIdentity:
        """Return condition, annotator and its version, resolution, digest of the weights, and the pairs."""
        config, inputs, version = self.config, [StageInput.of("pairs", self.pairs)], EXACT_VERSION
        if config.annotator != EXACT:
            spec = find_annotator(config.annotator)
            version = spec.version
            digest = spec.choose_digest(config.weights_sha256)
            if digest:
                inputs.append(StageInput(role="weights", fingerprint=digest))
        content = {
            "condition": config.condition,
            "annotator": config.annotator,
            "annotator_version": version,
            "resolution": config.resolution,
        }
        return StageIdentity(stage="annotate", version=VERSION, config=content, inputs=tuple(inputs))

    def count_shards(self) -> int:
        """Return the pairs' own number of shards."""
        return len(self.manifest.shards)

    def count_at_once(self, context: Context[AnnotateResources]) -> int:
        """Return what the resources say: the device works on while one shard is written and the next is read."""
        return context.resources.shards_at_once

    @contextmanager
    def open_maker(self, context: Context[AnnotateResources]) -> Iterator[MakeShard]:
        """Give what annotates a shard, its network loaded."""
        if self.config.resolution == "native":
            check_source(self.manifest, self.ingest)
        logger.info("annotating %d pairs with %s (%s)", self.pairs.rows, self.config.annotator, self.config.condition)
        with open_shard_maker(self.config, self.manifest, context.store, context.resources, self.ingest) as make_shard:
            yield make_shard


def check_source(pairs: Manifest, ingest: IngestConfig | None) -> None:
    """Raise ValueError where the source that lies there now is not the one that the pairs were made from."""
    digest = build_native_source(require_ingest(ingest)).digest()
    ingested = pairs.identity.digests["source"]
    if digest != ingested:
        raise ValueError(
            f"the source of {pairs.ref.uri} has changed: its digest is {digest}, it was ingested with {ingested}: "
            "ingest it again, or restore the files that its table names"
        )
