"""What a stage is: a frozen value that knows what its output is a function of, and how to make it in a context.

``obtain`` asks the one question that makes every stage cached and rerunnable: is it sealed?
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import UnsealedError, find_sealed
from prompt_diffusion.store.records import MadeShard, ManifestRef, Progress
from prompt_diffusion.store.sharded import MakeShard, make_shards, refuse_to_make, run_sharded_stage

R = TypeVar("R")
Report = Callable[[Progress], None]
"""Hears how far a stage is."""


def _stay_silent(progress: Progress) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Context(Generic[R]):
    """Where and how a stage runs: nothing here may change what comes out. ``R`` is the kind of the stage's resources."""

    store: str
    """Folder or URI that keeps every stage."""
    resources: R
    """How much of this machine the stage takes; None for a stage that leaves no choice."""
    report: Report = _stay_silent
    """Hears how far the stage is."""
    made: tuple[MadeShard, ...] = ()
    """Shards that workers made and reported: they are not read again, only their sizes are checked before sealing."""


@dataclass(frozen=True)
class Stage(ABC, Generic[R]):
    """A stage as a value: its configuration and its inputs are fields. ``R`` is the kind of its resources."""

    @cached_property
    def identity(self) -> StageIdentity:
        """What the output is a function of, found out once: the files of a source may take long to list."""
        return self.identify()

    @property
    @abstractmethod
    def title(self) -> str:
        """What people call it, in a few words: of a run, a log line, a bar."""

    @abstractmethod
    def identify(self) -> StageIdentity:
        """Return what the output is a function of; ValueError where the inputs are not what the stage reads."""

    @abstractmethod
    def run(self, context: Context[R]) -> ManifestRef:
        """Make the output, seal it and return its reference. Call ``obtain``, which first asks whether it is sealed."""


Follow = Callable[[Stage[R], Context[R]], AbstractContextManager[Report]]
"""Surrounds the work of a stage and gives what hears of it; not entered where the stage is sealed."""


def _follow_context(stage: Stage[R], context: Context[R]) -> AbstractContextManager[Report]:
    return nullcontext(context.report)


def obtain(stage: Stage[R], context: Context[R], follow: Follow[R] = _follow_context) -> ManifestRef:
    """Return a stage's sealed output: at once where it is sealed, made now where it is not."""
    sealed = find_sealed(stage.identity, context.store)
    if sealed is not None:
        return sealed
    with follow(stage, context) as report:
        return stage.run(replace(context, report=report))


def require(stage: Stage[R], store: str) -> ManifestRef:
    """Return a stage's sealed output; UnsealedError names a stage that is not sealed."""
    identity = stage.identity
    sealed = find_sealed(identity, store)
    if sealed is None:
        raise UnsealedError(
            f"stage {identity.stage!r} is not sealed: {stage.title}, {identity.uri(store)}, is missing, "
            "and upstream is 'require'"
        )
    return sealed


@dataclass(frozen=True)
class ShardedStage(Stage[R], ABC, Generic[R]):
    """A stage whose output is Parquet shards, each a function of the identity and its own number alone.

    ``run`` makes the whole stage; or workers make parts of it, and ``run``, told what they made, seals them.
    """

    @abstractmethod
    def count_shards(self) -> int:
        """Return how many shards the output has."""

    @abstractmethod
    def open_maker(self, context: Context[R]) -> AbstractContextManager[MakeShard]:
        """Give the function that makes a shard, for the time of the block; entered only where a shard may be missing."""

    def count_at_once(self, context: Context[R]) -> int:
        """Return how many shards are under way at the same time."""
        return 1

    @property
    def reject_budget(self) -> float:
        """The largest share of the samples that may be rejected."""
        return 0.01

    def run(self, context: Context[R]) -> ManifestRef:
        """Make the shards that are missing, seal all and return the reference."""
        num_shards = self.count_shards()
        if len(context.made) == num_shards > 0:  # only to be sealed: nothing need be loaded
            return run_sharded_stage(
                self.identity,
                context.store,
                num_shards,
                refuse_to_make,
                made=context.made,
                reject_budget=self.reject_budget,
            )
        with self.open_maker(context) as make_shard:
            return run_sharded_stage(
                self.identity,
                context.store,
                num_shards,
                make_shard,
                made=context.made,
                num_at_once=self.count_at_once(context),
                reject_budget=self.reject_budget,
                on_progress=context.report,
            )

    def make_part(self, indices: Sequence[int], context: Context[R]) -> list[MadeShard]:
        """Find or make some of the shards, and seal nothing: one worker's part."""
        with self.open_maker(context) as make_shard:
            return make_shards(
                self.identity,
                context.store,
                self.count_shards(),
                make_shard,
                indices,
                num_at_once=self.count_at_once(context),
                on_progress=context.report,
            )
