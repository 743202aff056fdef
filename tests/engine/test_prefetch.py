"""Micro-batches prepared ahead: how many, and from where after their size was halved."""

import threading

from prompt_diffusion.engine.distributed import SINGLE_PROCESS, World
from prompt_diffusion.engine.prefetch import Prefetcher
from tests.sharing import PATIENCE_SECONDS

BATCH_SIZE = 8


def test_micro_batches_are_prepared_ahead_across_steps_but_only_a_few():
    prepared, has_enough = [], threading.Event()

    def prepare(indices: range) -> range:
        prepared.append(indices)
        if len(prepared) == 4:
            has_enough.set()
        return indices

    with Prefetcher(prepare, range(100), BATCH_SIZE, SINGLE_PROCESS, micro_batch_size=4, num_threads=2) as batches:
        assert next(batches.take(0)) == range(4)
        assert has_enough.wait(PATIENCE_SECONDS), "nothing of the second step was prepared during the first"
    # the block ends when the threads have: what they were given before is done or cancelled, and nothing came after
    assert sorted(prepared, key=lambda indices: indices.start) == [range(i, i + 4) for i in range(0, 16, 4)]


def test_after_halving_a_step_begins_anew_and_the_later_ones_follow():
    with Prefetcher(lambda indices: indices, range(2, 5), BATCH_SIZE, World(1, 2), 4, num_threads=3) as batches:
        assert list(batches.take(2)) == [range(20, 24)]
        assert list(batches.take(3)) == [range(28, 32)]
        batches.halve_micro_batch(3)
        assert batches.micro_batch_size == 2
        assert list(batches.take(3)) == [range(28, 30), range(30, 32)]
        assert list(batches.take(4)) == [range(36, 38), range(38, 40)]
        assert list(batches.take(5)) == []


def test_a_micro_batch_is_never_larger_than_the_processes_share():
    with Prefetcher(lambda indices: indices, range(1), BATCH_SIZE, World(0, 4), 100, num_threads=1) as batches:
        assert list(batches.take(0)) == [range(2)]
