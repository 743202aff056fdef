"""Which sample stands where in the stream: a function of (seed, index, sizes) alone, whatever runs it.

Every random decision of a training sample is drawn from a counter-based generator keyed by (seed, index), so the stream is
the same after a restart, for any number of processes and for any micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW_SHARDS = 64


def sample_generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Return the generator of one sample: Philox keyed by (seed, stream), its counter started at the index."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


@dataclass(frozen=True)
class RowOrder:
    """The order in which a training visits its rows: a permutation of them each epoch, near in time where near in the store.

    Shards are shuffled and taken in windows; the rows of a window are shuffled among each other. Up to ``WINDOW_SHARDS``
    shards make one window, so a small dataset is shuffled as a whole; of a large one, a window at a time must be at hand.
    """

    seed: int
    shard_rows: tuple[int, ...]
    """Rows of each shard, in the order of the store; rows are numbered through."""

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return sum(self.shard_rows)

    def row_at(self, index: int) -> int:
        """Return the row of a sample index."""
        epoch, position = divmod(index, self.num_rows)
        return int(_order_rows(self.seed, epoch, self.shard_rows)[position])

    def find_window(self, index: int) -> tuple[int, int]:
        """Return the epoch and the number of the window that a sample index falls into."""
        epoch, position = divmod(index, self.num_rows)
        sizes = [sum(self.shard_rows[shard] for shard in shards) for shards in self.windows(epoch)]
        return epoch, int(np.searchsorted(np.cumsum(sizes), position, side="right"))

    def windows(self, epoch: int) -> list[list[int]]:
        """Return the shards of each window of an epoch, in the order in which they are visited."""
        order = [shard for shard in _order_shards(self.seed, epoch, self.shard_rows) if self.shard_rows[shard]]
        return [order[start : start + WINDOW_SHARDS] for start in range(0, len(order), WINDOW_SHARDS)]


def _order_shards(seed: int, epoch: int, shard_rows: tuple[int, ...]) -> list[int]:
    if len(shard_rows) <= WINDOW_SHARDS:
        return list(range(len(shard_rows)))
    return [int(shard) for shard in sample_generator(seed, epoch, stream=2).permutation(len(shard_rows))]


@lru_cache(maxsize=4)
def _order_rows(seed: int, epoch: int, shard_rows: tuple[int, ...]) -> NDArray[np.int64]:
    if sum(shard_rows) < 1:
        raise ValueError("a stream needs at least one row")
    generator = sample_generator(seed, epoch, stream=1)
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    parts = []
    for shards in RowOrder(seed, shard_rows).windows(epoch):
        rows = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        parts.append(rows[generator.permutation(len(rows))])
    return np.concatenate(parts)


class Order(Protocol):
    """The order in which a training visits its rows."""

    def row_at(self, index: int) -> int:
        """Return the row of a sample index."""

    def find_window(self, index: int) -> tuple[int, int]:
        """Return the epoch and the number of the window that a sample index falls into."""

    def windows(self, epoch: int) -> list[list[int]]:
        """Return the shards of each window of an epoch, in the order in which they are visited."""


class GroupOrder:
    """The published order: each epoch visits every prompt group once, by one of its rows, drawn uniformly.

    A group of four pairs counts as one of a single pair. The rows that an epoch draws are visited as RowOrder visits all.
    """

    def __init__(self, seed: int, shard_rows: tuple[int, ...], group_ids: Sequence[str]) -> None:
        """Take the rows of each shard and the prompt group of each row, rows numbered through in the order of the store."""
        assert len(group_ids) == sum(shard_rows), "every row has a prompt group"
        self.seed, self.shard_rows = seed, shard_rows
        numbers: dict[str, int] = {}
        groups = np.array([numbers.setdefault(group, len(numbers)) for group in group_ids], np.int64)
        self.num_groups = len(numbers)
        """Samples of an epoch."""
        # The rows sorted by group, and where each group begins among them: a draw of all groups is then one addition.
        self._rows = np.argsort(groups, kind="stable")
        self._sizes = np.bincount(groups)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._shard_ends = np.cumsum(shard_rows)
        self._drawn: dict[int, tuple[NDArray[np.int64], RowOrder]] = {}

    def row_at(self, index: int) -> int:
        """Return the row of a sample index."""
        rows, order = self._draw(index // self.num_groups)
        return int(rows[order.row_at(index)])

    def find_window(self, index: int) -> tuple[int, int]:
        """Return the epoch and the number of the window that a sample index falls into."""
        return self._draw(index // self.num_groups)[1].find_window(index)

    def windows(self, epoch: int) -> list[list[int]]:
        """Return the shards of each window of an epoch, in the order in which they are visited."""
        return self._draw(epoch)[1].windows(epoch)

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], RowOrder]:
        """Return an epoch's row of each group, in the order of the store, and the order in which they are visited."""
        drawn = self._drawn.get(epoch)
        if drawn is None:
            picks = sample_generator(self.seed, epoch, stream=3).integers(self._sizes)
            rows = np.sort(self._rows[self._starts + picks])
            in_shards = np.bincount(
                np.searchsorted(self._shard_ends, rows, side="right"), minlength=len(self.shard_rows)
            )
            drawn = rows, RowOrder(self.seed, tuple(in_shards.tolist()))
            # Two epochs are in use where one ends: older ones are dropped. Threads that race draw the same.
            self._drawn = {other: kept for other, kept in self._drawn.items() if abs(other - epoch) <= 1} | {
                epoch: drawn
            }
        return drawn


def split_batch(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the sample indices of one rank in one step: contiguous, disjoint, together the whole batch."""
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} samples does not divide among {world_size} processes")
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return range(start, start + share)
