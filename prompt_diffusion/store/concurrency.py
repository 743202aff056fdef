"""Work in threads that stays in order and within bounds."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], max_pending: int) -> Iterator[R]:
    """Yield ``function(item)`` of each item, in order, computed in the pool ahead of being asked for.

    At most ``max_pending`` items are under way or done and not yet taken, so memory is bounded; ``items`` is read in the
    caller's thread. The first error ends it, and what has not begun then never does.
    """
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= max_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
