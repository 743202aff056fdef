"""What a step is fed with: micro-batches that threads prepare ahead of the device, in the stream's order."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Generic, Self, cast

from prompt_diffusion.data.sampler import split_batch
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.objective import Batch
from prompt_diffusion.store.concurrency import map_ahead

_MORE_THAN_THREADS = 2
"""Micro-batches beside those that the threads are at: one that the device computes with, one that waits for it."""


class Feed(Generic[Batch]):
    """The prepared micro-batches of one process; preparing runs on over the steps' boundaries, a few ahead."""

    def __init__(
        self,
        prepare: Callable[[range], Batch],
        steps: range,
        batch_size: int,
        world: World,
        size: int,
        num_threads: int,
    ) -> None:
        """Begin with the first of the steps, ``size`` samples at once."""
        self.prepare, self.steps, self.batch_size, self.world = prepare, steps, batch_size, world
        self.size, self.num_threads = min(size, batch_size // world.size), num_threads
        self._pool = ThreadPoolExecutor(num_threads, "prepare")
        self._ahead = self._begin(steps.start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ahead.close()
        self._pool.shutdown()

    def take(self, step: int) -> Iterator[Batch]:
        """Return the micro-batches of a step: those of the one after the last, or after ``halve``."""
        return islice(self._ahead, len(self._cut(step)))

    def halve(self, step: int) -> None:
        """Go on from the beginning of a step with half as many samples at once."""
        self.size = (self.size + 1) // 2
        self._ahead.close()
        self._ahead = self._begin(step)

    def _begin(self, step: int) -> Generator[Batch, None, None]:
        parts = (part for later in range(step, self.steps.stop) for part in self._cut(later))
        ahead = map_ahead(self._pool, self.prepare, parts, self.num_threads + _MORE_THAN_THREADS)
        return cast("Generator[Batch, None, None]", ahead)

    def _cut(self, step: int) -> list[range]:
        indices = split_batch(step, self.batch_size, self.world.rank, self.world.size)
        return [indices[start : start + self.size] for start in range(0, len(indices), self.size)]
