"""The small values that manifests are made of, and the two ways in which a folder is refused."""

from collections.abc import Callable
from dataclasses import dataclass

from prompt_diffusion.frozen import FrozenModel


class UnsealedError(ValueError):
    """The folder has no manifest: its stage has not finished."""


class DamagedDataError(ValueError):
    """A file is not what its manifest says; the message names it."""


class Reject(FrozenModel):
    """A sample that was left out, and why."""

    sample_id: str
    """The sample, as its source names it."""
    reason: str
    """One sentence."""


class ManifestRef(FrozenModel):
    """All that a task returns about a sealed manifest."""

    uri: str
    """The folder."""
    stage: str
    """The stage that made it."""
    fingerprint: str
    """The digest of the stage's identity."""
    rows: int
    """How many rows its files hold in total."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a manifest, as it was when it was sealed."""

    path: str
    """Relative to the manifest's folder, POSIX."""
    rows: int
    """Rows of a shard; 0 for what has none."""
    bytes: int
    """Size."""
    sha256: str
    """Digest of the content, 64 hex digits."""


class MadeShard(FrozenModel):
    """One finished shard: what the manifest says of it, and the samples that it leaves out."""

    index: int
    """Its number."""
    file: StoredFile
    """The file."""
    rejects: tuple[Reject, ...] = ()
    """What was left out of it."""


class Progress:
    """What a stage reports while it runs; each kind of stage has its own kinds of progress."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ShardProgress(Progress):
    """Where a sharded stage stands."""

    num_done: int
    """Shards that are finished, those of earlier runs among them."""
    num_shards: int
    """Shards in all."""
    num_rows: int
    """Rows in the finished shards."""
    num_rejects: int
    """Samples that they leave out."""


OnProgress = Callable[[ShardProgress], None]
