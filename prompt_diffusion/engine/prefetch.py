"""Micro-batches that threads prepare ahead of the device, in the order of the sample stream."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Generic, Self, cast

from prompt_diffusion.data.sampler import split_batch
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.objective import BatchT
from prompt_diffusion.store.concurrency import map_ahead

_MORE_THAN_THREADS = 2
"""Micro-batches beside those being prepared: one that the device computes with, one that is ready for it."""


class Prefetcher(Generic[BatchT]):
    """Prepares one process's micro-batches a few ahead, across step boundaries."""

    def __init__(
        self,
        prepare: Callable[[range], BatchT],
        steps: range,
        batch_size: int,
        world: World,
        micro_batch_size: int,
        num_threads: int,
    ) -> None:
        """Start at the first of the steps."""
        self.prepare, self.steps, self.batch_size, self.world = prepare, steps, batch_size, world
        self.micro_batch_size, self.num_threads = min(micro_batch_size, batch_size // world.size), num_threads
        self._pool = ThreadPoolExecutor(num_threads, "prepare")
        self._ahead = self._start(steps.start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ahead.close()
        self._pool.shutdown()

    def take(self, step: int) -> Iterator[BatchT]:
        """Return the micro-batches of a step: the next one, or the one given to ``halve_micro_batch``."""
        return islice(self._ahead, len(self._split(step)))

    def halve_micro_batch(self, step: int) -> None:
        """Start again at the beginning of a step, with half the micro-batch size."""
        self.micro_batch_size = (self.micro_batch_size + 1) // 2
        self._ahead.close()
        self._ahead = self._start(step)

    def _start(self, step: int) -> Generator[BatchT, None, None]:
        parts = (part for later in range(step, self.steps.stop) for part in self._split(later))
        ahead = map_ahead(self._pool, self.prepare, parts, self.num_threads + _MORE_THAN_THREADS)
        return cast("Generator[BatchT, None, None]", ahead)

    def _split(self, step: int) -> list[range]:
        """Return the sample indices of each micro-batch of a step."""
        indices, size = split_batch(step, self.batch_size, self.world.rank, self.world.size), self.micro_batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]
