from collections import Counter

import numpy as np
import pytest

from prompt_diffusion.data.sampler import WINDOW_SHARDS, GroupOrder, RowOrder, sample_generator, split_batch

PINNED_ORDER = [9, 4, 2, 1, 0, 7, 8, 5, 3, 6]


@pytest.mark.parametrize("shard_rows", [(17,), (5, 0, 12), (3,) * 200, (1, 0) * 100])
def test_every_epoch_visits_every_row_once(shard_rows):
    order = RowOrder(5, shard_rows)
    for epoch in range(3):
        rows = [order.row_at(epoch * order.num_rows + i) for i in range(order.num_rows)]
        assert sorted(rows) == list(range(order.num_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    for shard_rows in ((50,), (2,) * 100):
        orders = {
            tuple(RowOrder(seed, shard_rows).row_at(epoch * sum(shard_rows) + i) for i in range(sum(shard_rows)))
            for seed in (0, 1)
            for epoch in (0, 1)
        }
        assert len(orders) == 4


def test_the_order_is_pinned():
    # a change here reorders every training and must bump the stage's VERSION
    assert [RowOrder(0, (4, 6)).row_at(i) for i in range(10)] == PINNED_ORDER


def test_a_large_dataset_is_visited_window_by_window():
    order = RowOrder(3, (4,) * (3 * WINDOW_SHARDS))
    windows = order.windows(epoch=1)
    assert sorted(shard for window in windows for shard in window) == list(range(3 * WINDOW_SHARDS))
    for number, window in enumerate(windows):
        start = order.num_rows + number * 4 * WINDOW_SHARDS
        rows = [order.row_at(start + i) for i in range(4 * WINDOW_SHARDS)]
        assert {row // 4 for row in rows} == set(window)
        assert {order.find_window(start + i) for i in range(4 * WINDOW_SHARDS)} == {(1, number)}


def test_generators_of_neighbouring_samples_are_independent():
    draws = np.array([sample_generator(3, i).standard_normal(200) for i in range(40)])
    correlations = np.corrcoef(draws)[~np.eye(40, dtype=bool)]
    assert np.abs(correlations).max() < 0.35
    assert sample_generator(3, 7).random() == sample_generator(3, 7).random()


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_a_batch_without_gap_or_repeat(world_size):
    indices = [i for rank in range(world_size) for i in split_batch(4, 12, rank, world_size)]
    assert indices == list(range(48, 60))


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="batch of 10 samples does not divide among 4 processes"):
        split_batch(0, 10, 0, 4)


def make_group_order(sizes, shard_rows, seed=0):
    """Return an order over groups of those sizes, and the group of each row."""
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    return GroupOrder(seed, shard_rows, groups), groups


@pytest.mark.parametrize("shard_rows", [(30,), (10, 0, 20), (3,) * 10])
def test_every_epoch_visits_every_group_once_whatever_its_size(shard_rows):
    sizes = (4, 1, 2, 3, 1, 1, 4, 4, 1, 1, 4, 4)
    order, groups = make_group_order(sizes, shard_rows)
    for epoch in range(4):
        visited = [groups[order.row_at(epoch * len(sizes) + i)] for i in range(len(sizes))]
        assert Counter(visited) == Counter(f"g{number}" for number in range(len(sizes)))


def test_the_rows_of_a_group_share_its_visits_evenly():
    order, _ = make_group_order((4, 1), (5,))
    visits = Counter(order.row_at(i) for i in range(2 * 1_000))
    assert visits[4] == 1_000
    assert all(abs(visits[row] - 250) < 55 for row in range(4))  # four standard deviations


def test_a_group_is_one_wherever_its_rows_lie():
    groups = [f"g{row % 7}" for row in range(40)]
    order = GroupOrder(1, (8,) * 5, groups)
    for epoch in range(3):
        assert len({groups[order.row_at(7 * epoch + i)] for i in range(7)}) == 7


def test_the_order_of_groups_is_a_function_of_seed_and_index_alone():
    sizes, shards = (4, 1, 2) * 20, (14,) * 10
    stream = [make_group_order(sizes, shards)[0].row_at(i) for i in range(300)]
    backwards, _ = make_group_order(sizes, shards)
    assert [backwards.row_at(i) for i in reversed(range(300))] == stream[::-1]
    assert [make_group_order(sizes, shards, 1)[0].row_at(i) for i in range(300)] != stream
    assert stream[:60] != stream[60:120]


def test_groups_are_visited_window_by_window():
    order, _ = make_group_order((4,) * (3 * WINDOW_SHARDS), (4,) * (3 * WINDOW_SHARDS))
    windows = order.windows(epoch=1)
    assert sorted(shard for window in windows for shard in window) == list(range(3 * WINDOW_SHARDS))
    for number, window in enumerate(windows):
        start = order.num_groups + number * WINDOW_SHARDS
        assert {order.row_at(start + i) // 4 for i in range(WINDOW_SHARDS)} == set(window)
        assert {order.find_window(start + i) for i in range(WINDOW_SHARDS)} == {(1, number)}
