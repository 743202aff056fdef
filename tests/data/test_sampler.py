import numpy as np
import pytest

from prompt_diffusion.data.sampler import row_at, sample_generator, split_batch

PINNED_ORDER = [9, 4, 2, 1, 0, 7, 8, 5, 3, 6]


def test_every_epoch_visits_every_row_once():
    for epoch in range(3):
        rows = [row_at(seed=5, index=epoch * 17 + i, num_rows=17) for i in range(17)]
        assert sorted(rows) == list(range(17))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(row_at(seed, epoch * 50 + i, 50) for i in range(50)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_order_is_pinned():
    # a change here reorders every training and must bump the stage's VERSION
    assert [row_at(0, i, 10) for i in range(10)] == PINNED_ORDER


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
