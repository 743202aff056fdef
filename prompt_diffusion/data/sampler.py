"""Which sample stands where in the stream: a function of (seed, index, sizes) alone, whatever runs it.

Every random decision of a training sample is drawn from a counter-based generator keyed by (seed, index), so the stream is
the same after a restart, for any number of processes and for any micro-batch.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def sample_generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Return the generator of one sample: Philox keyed by (seed, stream), its counter started at the index."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    return sample_generator(seed, epoch, stream=1).permutation(num_rows)


def row_at(seed: int, index: int, num_rows: int) -> int:
    """Return the data row of a sample index: each epoch is one permutation of the rows, so none comes twice in it."""
    if num_rows < 1:
        raise ValueError(f"a stream needs at least one row, got {num_rows}")
    epoch, position = divmod(index, num_rows)
    return int(_permutation(seed, epoch, num_rows)[position])


def split_batch(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the sample indices of one rank in one step: contiguous, disjoint, together the whole batch."""
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} samples does not divide among {world_size} processes")
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return range(start, start + share)
