"""The loop on a problem whose every number can be worked out: what it skips, halves, averages and resumes."""

import math

import pytest
import torch

from prompt_diffusion.store.storage import join_uri
from prompt_diffusion.training.checkpoint import Progress, list_checkpoints
from prompt_diffusion.training.config import OptimizerConfig, TrainResources
from prompt_diffusion.training.loop import LoopPlan, run_loop
from prompt_diffusion.training.loss import weigh_by_snr
from prompt_diffusion.training.world import World

BATCH_SIZE = 8


class Parabola:
    """Sample i pulls the one parameter towards i modulo 5."""

    labels = ("parabola",)

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.asked: list[range] = []
        self.broken_steps: set[int] = set()
        self.gain: dict[int, float] = {}
        self.most_samples = BATCH_SIZE

    def compute_losses(self, indices: range):
        self.asked.append(indices)
        if len(indices) > self.most_samples:
            raise torch.OutOfMemoryError(f"{len(indices)} samples")
        targets = torch.tensor([float(index % 5) for index in indices])
        losses = (self.weight[None] - targets[:, None]).square().sum(dim=1)
        steps = [index // BATCH_SIZE for index in indices]
        factors = [math.nan if step in self.broken_steps else self.gain.get(step, 1.0) for step in steps]
        return losses * torch.tensor(factors), [0] * len(indices)


def train(
    tmp_path, objective: Parabola, num_steps: int = 6, device_batch_size: int = 8, every: float = 1e-9, **fields
) -> Progress:
    optimizer = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, **fields)
    plan = LoopPlan(num_steps, BATCH_SIZE, optimizer, join_uri(str(tmp_path), "checkpoints"))
    resources = TrainResources(device_batch_size=device_batch_size, checkpoint_every_seconds=every)
    return run_loop(objective, {"weight": objective.weight}, plan, resources, World())


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    with_gap, one_less = Parabola(), Parabola()
    with_gap.broken_steps = {5}
    progress = train(tmp_path / "gap", with_gap)
    train(tmp_path / "less", one_less, num_steps=5)
    assert progress.step == 6
    assert progress.num_skipped == 1
    assert torch.equal(with_gap.weight, one_less.weight)
    assert all(math.isfinite(record["loss"]) for record in progress.history)


def test_after_a_skipped_step_the_training_goes_on(tmp_path):
    objective = Parabola()
    objective.broken_steps = {1, 2}
    progress = train(tmp_path, objective, num_steps=60)
    assert progress.num_skipped == 2
    assert progress.skipped_in_a_row == 0
    assert (objective.weight - 2.0).abs().max() < 0.3


def test_a_gradient_above_the_recipes_norm_is_skipped(tmp_path):
    objective = Parabola()
    objective.gain = {2: 1e4}
    assert train(tmp_path / "free", objective).num_skipped == 0
    capped = Parabola()
    capped.gain = {2: 1e4}
    assert train(tmp_path / "capped", capped, skip_norm=100.0).num_skipped == 1


def test_five_in_a_row_stop_with_the_last_good_checkpoint_left(tmp_path):
    objective = Parabola()
    objective.broken_steps = set(range(3, 100))
    with pytest.raises(FloatingPointError, match=r"steps 4 to 8 .* stopped; the last checkpoint is whole"):
        train(tmp_path, objective, num_steps=20)
    assert list_checkpoints(join_uri(str(tmp_path), "checkpoints")) == ["step-00000006", "step-00000007"]
    assert torch.isfinite(objective.weight).all()
    healed = Parabola()
    assert train(tmp_path, healed, num_steps=20).step == 20


def test_out_of_memory_halves_the_micro_batch_and_leaves_the_batch(tmp_path):
    tight, roomy = Parabola(), Parabola()
    tight.most_samples = 3
    train(tmp_path / "tight", tight)
    train(tmp_path / "roomy", roomy, device_batch_size=2)
    assert torch.equal(tight.weight, roomy.weight)
    assert [len(indices) for indices in tight.asked[:6]] == [8, 4, 2, 2, 2, 2]
    assert all(len(indices) == 2 for indices in tight.asked[2:]), "halved once for all"


def test_a_sample_that_does_not_fit_is_said(tmp_path):
    objective = Parabola()
    objective.most_samples = 0
    with pytest.raises(MemoryError, match="one sample does not fit into the memory of cpu"):
        train(tmp_path, objective)


def test_the_average_of_the_weights_becomes_the_model(tmp_path):
    plain, averaged = Parabola(), Parabola()
    path = []
    for steps in range(1, 5):
        one = Parabola()
        train(tmp_path / str(steps), one, num_steps=steps)
        path.append(one.weight.detach().clone())
    expected = torch.zeros(3)
    for weight in path:
        expected = 0.75 * expected + 0.25 * weight
    train(tmp_path / "averaged", averaged, num_steps=4, ema_decay=0.75)
    torch.testing.assert_close(averaged.weight.detach(), expected)
    train(tmp_path / "plain", plain, num_steps=4)
    assert not torch.equal(plain.weight, averaged.weight)


def test_averages_and_counts_survive_a_restart_bit_for_bit(tmp_path):
    whole, first, second = Parabola(), Parabola(), Parabola()
    for objective in (whole, first, second):
        objective.broken_steps = {2}
    straight = train(tmp_path / "whole", whole, num_steps=8, ema_decay=0.9)

    def stop_at_five(indices: range):
        if indices.start == 5 * BATCH_SIZE:
            raise KeyboardInterrupt
        return Parabola.compute_losses(first, indices)

    first.compute_losses = stop_at_five  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", first, num_steps=8, ema_decay=0.9)
    resumed = train(tmp_path / "parts", second, num_steps=8, ema_decay=0.9)
    assert second.asked[0].start == 5 * BATCH_SIZE
    assert torch.equal(second.weight, whole.weight)
    assert resumed.history == straight.history
    assert resumed.num_skipped == straight.num_skipped == 1


def test_min_snr_weights_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.0])  # signal-to-noise ratios 9, 1, 0
    steps = torch.tensor([0, 1, 2])
    torch.testing.assert_close(weigh_by_snr(alphas, steps, 5.0, "epsilon"), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(weigh_by_snr(alphas, steps, 5.0, "v_prediction"), torch.tensor([0.5, 0.5, 0.0]))
