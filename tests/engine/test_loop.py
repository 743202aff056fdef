"""The loop on a problem whose every number can be worked out: what it skips, halves, averages and resumes."""

import math
import threading

import pytest
import torch

from prompt_diffusion.data.sampler import split_batch
from prompt_diffusion.engine.checkpoint import list_checkpoints
from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS, World
from prompt_diffusion.engine.loop import choose_micro_batch_size, run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.store.uris import join_uri
from tests.engine.objectives import BATCH_SIZE, Parabola, plan_loop, signal_at, stop_at, train


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    with_gap, one_less = Parabola(), Parabola()
    with_gap.broken_steps = {5}
    state = train(tmp_path / "gap", with_gap)
    train(tmp_path / "less", one_less, num_steps=5)
    assert state.step == 6
    assert state.num_skipped == 1
    assert torch.equal(with_gap.weight, one_less.weight)
    assert all(math.isfinite(record["loss"]) for record in state.history)


def test_after_a_skipped_step_the_training_goes_on(tmp_path):
    objective = Parabola()
    objective.broken_steps = {1, 2}
    state = train(tmp_path, objective, num_steps=60)
    assert state.num_skipped == 2
    assert state.skipped_in_a_row == 0
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
    assert list_checkpoints(join_uri(str(tmp_path), "checkpoints"))
    assert torch.isfinite(objective.weight).all()
    healed = Parabola()
    assert train(tmp_path, healed, num_steps=20).step == 20
    assert 0 < healed.asked[0].start <= 7 * BATCH_SIZE


def test_a_run_that_skipped_all_it_did_so_far_goes_on(tmp_path):
    objective = Parabola()
    objective.broken_steps = {0}
    stop_at(objective, 1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, objective)
    assert train(tmp_path, Parabola()).num_skipped == 1


def test_out_of_memory_halves_the_micro_batch_and_leaves_the_batch(tmp_path):
    tight, roomy = Parabola(), Parabola()
    tight.most_samples = 3
    train(tmp_path / "tight", tight)
    train(tmp_path / "roomy", roomy, device_batch_size=2)
    assert torch.equal(tight.weight, roomy.weight)
    assert [len(indices) for indices in tight.asked[:6]] == [8, 4, 2, 2, 2, 2]
    assert all(len(indices) == 2 for indices in tight.asked[2:]), "halved once for all"
    assert [i for indices in tight.asked[2:] for i in indices] == list(range(6 * BATCH_SIZE)), "the stream has moved"


def test_out_of_memory_in_the_middle_of_a_step_begins_the_step_anew(tmp_path):
    late, small = Parabola(), Parabola()
    compute_losses = late.compute_losses

    def grow_tight(batch):
        if batch[0].start >= 3 * BATCH_SIZE + 4:
            late.most_samples = 2
        return compute_losses(batch)

    late.compute_losses = grow_tight  # type: ignore[method-assign]
    train(tmp_path / "late", late, device_batch_size=4)
    train(tmp_path / "small", small, device_batch_size=2)
    at = late.asked.index(range(28, 32))
    assert late.asked[at - 1 : at + 3] == [range(24, 28), range(28, 32), range(24, 26), range(26, 28)]
    done = late.asked[: at - 1] + late.asked[at + 1 :]
    assert [i for indices in done for i in indices] == list(range(6 * BATCH_SIZE))
    torch.testing.assert_close(late.weight, small.weight, rtol=1e-6, atol=1e-7)


def test_a_sample_that_does_not_fit_is_said(tmp_path):
    objective = Parabola()
    objective.most_samples = 0
    with pytest.raises(MemoryError, match="one sample does not fit into the memory of cpu"):
        train(tmp_path, objective)


def test_a_gpu_begins_with_its_whole_share_and_a_cpu_with_little(tmp_path):
    plan, automatic = LoopPlan(1, 512, OptimizerConfig(), str(tmp_path)), TrainResources()
    assert choose_micro_batch_size(plan, automatic, World(0, 4, torch.device("cuda"))) == 128
    assert choose_micro_batch_size(plan, automatic, World(0, 4)) == 16
    assert choose_micro_batch_size(plan, automatic, World(0, 64)) == 8
    assert choose_micro_batch_size(plan, TrainResources(device_batch_size=48), World(0, 4)) == 48


def test_the_steps_are_those_of_a_plain_loop_for_any_number_of_threads(tmp_path):
    """Bit for bit: the same micro-batches, one after the other, with nothing prepared ahead."""
    plain, values = Parabola(), []
    adamw = torch.optim.AdamW([plain.weight], lr=0.1, weight_decay=0.0, fused=True)
    for step in range(6):
        losses = []
        for start in (0, 3, 6):
            indices = split_batch(step, BATCH_SIZE, 0, 1)[start : start + 3]
            losses.append(plain.compute_losses(plain.prepare(indices))[0])
            (losses[-1].sum() / BATCH_SIZE).backward()
        adamw.step()
        adamw.zero_grad()
        values.append(float(torch.cat(losses).detach().double().mean()))
    for num_threads in (1, 3):
        ahead = Parabola()
        resources = TrainResources(device_batch_size=3, loader_threads=num_threads)
        plan = plan_loop(tmp_path / str(num_threads))
        state = run_loop(ahead, {"weight": ahead.weight}, plan, resources, SINGLE_PROCESS)
        assert torch.equal(ahead.weight, plain.weight)
        assert [record["loss"] for record in state.history] == values
        assert ahead.asked == plain.asked


def test_an_error_in_preparing_ends_the_run_with_that_error(tmp_path):
    objective = Parabola()

    def fail(indices: range):
        if indices.start == 3 * BATCH_SIZE:
            raise OSError("the shard is gone")
        return Parabola.prepare(objective, indices)

    objective.prepare = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the shard is gone"):
        train(tmp_path, objective)
    assert len(objective.asked) == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("prepare", "checkpoint"))]


def test_the_ema_of_the_weights_becomes_the_model(tmp_path):
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ema_and_counts_survive_a_restart_bit_for_bit(tmp_path, optimizer):
    whole, first, second = Parabola(), Parabola(), Parabola()
    for objective in (whole, first, second):
        objective.weight = torch.nn.Parameter(torch.zeros(1, 3) if optimizer == "muon" else torch.zeros(3))
        objective.broken_steps = {2}
    straight = train(tmp_path / "whole", whole, num_steps=8, ema_decay=0.9, name=optimizer)
    stop_at(first, 5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", first, num_steps=8, ema_decay=0.9, name=optimizer)
    resumed = train(tmp_path / "parts", second, num_steps=8, ema_decay=0.9, name=optimizer)
    assert 0 < second.asked[0].start <= 5 * BATCH_SIZE
    assert torch.equal(second.weight, whole.weight)
    assert resumed.history == straight.history
    assert resumed.num_skipped == straight.num_skipped == 1


def test_a_signal_saves_and_ends(tmp_path):
    stopped, resumed, whole = Parabola(), Parabola(), Parabola()
    signal_at(stopped, 3)
    with pytest.raises(Stopped, match="stopped at step 4 of 6"):
        train(tmp_path / "parts", stopped, every=1e9)
    assert list_checkpoints(join_uri(str(tmp_path / "parts"), "checkpoints")) == ["step-00000004"]
    train(tmp_path / "parts", resumed, every=1e9)
    train(tmp_path / "whole", whole, every=1e9)
    assert resumed.asked[0].start == 4 * BATCH_SIZE
    assert torch.equal(resumed.weight, whole.weight)
