"""The loop on a problem whose every number can be worked out: what it skips, halves, averages, validates and resumes."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from prompt_diffusion.data.sampler import split_batch
from prompt_diffusion.store.storage import join_uri
from prompt_diffusion.training import world as world_module
from prompt_diffusion.training.checkpoint import Progress, list_checkpoints
from prompt_diffusion.training.config import OptimizerConfig, TrainResources
from prompt_diffusion.training.feed import Feed
from prompt_diffusion.training.loop import Stopped, choose_device_batch, run_loop
from prompt_diffusion.training.meter import count_flop
from prompt_diffusion.training.plan import LoopPlan
from prompt_diffusion.training.world import ALONE, World, join_world

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

    def prepare(self, indices: range):
        return indices, torch.tensor([float(index % 5) for index in indices])

    def compute_losses(self, batch):
        indices, targets = batch
        self.asked.append(indices)
        if len(indices) > self.most_samples:
            raise torch.OutOfMemoryError(f"{len(indices)} samples")
        losses = (self.weight.view(1, -1) - targets[:, None]).square().sum(dim=1)
        steps = [index // BATCH_SIZE for index in indices]
        factors = [math.nan if step in self.broken_steps else self.gain.get(step, 1.0) for step in steps]
        return losses * torch.tensor(factors), [0] * len(indices)


def plan_loop(folder, num_steps: int = 6, **fields) -> LoopPlan:
    optimizer = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, **fields)
    return LoopPlan(num_steps, BATCH_SIZE, optimizer, join_uri(str(folder), "checkpoints"))


def train(
    tmp_path, objective: Parabola, num_steps: int = 6, device_batch_size: int = 8, every: float = 1e-9, **fields
) -> Progress:
    resources = TrainResources(device_batch_size=device_batch_size, checkpoint_every_seconds=every)
    return run_loop(objective, {"weight": objective.weight}, plan_loop(tmp_path, num_steps, **fields), resources, ALONE)


def stop_at(objective: Parabola, step: int) -> None:
    """Have an objective interrupt the run at a step, before its gradient."""
    compute_losses = objective.compute_losses

    def interrupt(batch):
        if batch[0].start >= step * BATCH_SIZE:
            raise KeyboardInterrupt
        return compute_losses(batch)

    objective.compute_losses = interrupt  # type: ignore[method-assign]


def signal_at(objective: Parabola, step: int) -> None:
    """Have an objective send this process SIGTERM while it computes a step."""
    compute_losses = objective.compute_losses

    def ask_to_stop(batch):
        if batch[0].start // BATCH_SIZE == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_losses(batch)

    objective.compute_losses = ask_to_stop  # type: ignore[method-assign]


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
    assert choose_device_batch(plan, automatic, World(0, 4, torch.device("cuda"))) == 128
    assert choose_device_batch(plan, automatic, World(0, 4)) == 16
    assert choose_device_batch(plan, automatic, World(0, 64)) == 8
    assert choose_device_batch(plan, TrainResources(device_batch_size=48), World(0, 4)) == 48


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
        progress = run_loop(ahead, {"weight": ahead.weight}, plan, resources, ALONE)
        assert torch.equal(ahead.weight, plain.weight)
        assert [record["loss"] for record in progress.history] == values
        assert ahead.asked == plain.asked


def test_micro_batches_are_prepared_ahead_over_steps_but_only_a_few():
    prepared, second_step = [], threading.Event()

    def prepare(indices: range) -> range:
        prepared.append(indices)
        if indices.start == BATCH_SIZE:
            second_step.set()
        return indices

    with Feed(prepare, range(100), BATCH_SIZE, ALONE, size=4, num_threads=2) as feed:
        first = next(feed.take(0))
        assert first == range(4)
        assert second_step.wait(10), "nothing of the second step was prepared while the first was under way"
        time.sleep(0.1)
        assert len(prepared) == 4


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_averages_and_counts_survive_a_restart_bit_for_bit(tmp_path, optimizer):
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


def validate_with(objective: Parabola, losses: dict[int, float], seen: list[tuple[int, torch.Tensor]]):
    def validate(step: int) -> float:
        seen.append((step, objective.weight.detach().clone()))
        return losses[step]

    return validate


def test_validations_see_the_averages_and_leave_the_training_as_it_is(tmp_path):
    plain, validated, losses = Parabola(), Parabola(), {2: 5.0, 4: 3.0, 5: 4.0}
    train(tmp_path / "plain", plain, num_steps=5, ema_decay=0.75)
    seen: list[tuple[int, torch.Tensor]] = []
    events: list[dict] = []
    resources = TrainResources(validate_every_steps=2, log_every_steps=5)
    plan = plan_loop(tmp_path / "validated", 5, ema_decay=0.75)
    validate = validate_with(validated, losses, seen)
    progress = run_loop(validated, {"weight": validated.weight}, plan, resources, ALONE, events.append, validate)
    assert torch.equal(validated.weight, plain.weight)
    assert torch.equal(seen[-1][1], plain.weight), "the last validation is of the model that comes out"
    assert progress.validations == [{"step": step, "loss": loss} for step, loss in losses.items()]
    assert [event for event in events if "loss" not in event] == [
        {"step": step, "num_steps": 5, "validation_loss": loss, "is_best": step != 5} for step, loss in losses.items()
    ]
    # far from due by the clock: the best so far are saved, and the last
    assert list_checkpoints(plan.checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]


def test_no_step_is_validated_twice_and_none_is_left_out_by_a_stop(tmp_path):
    losses, events = {2: 1.0, 4: 2.0, 6: 3.0}, []
    resources = TrainResources(validate_every_steps=2, checkpoint_every_seconds=1e-9)
    plan = plan_loop(tmp_path)
    stopped, resumed, again = Parabola(), Parabola(), Parabola()
    seen: list[tuple[int, torch.Tensor]] = []
    signal_at(stopped, 3)
    for objective in (stopped, resumed, again):
        arguments = ({"weight": objective.weight}, plan, resources, ALONE, events.append)
        validate = validate_with(objective, losses, seen)
        if objective is stopped:
            with pytest.raises(Stopped, match="stopped at step 4 of 6"):
                run_loop(objective, *arguments, validate)
            assert [step for step, _ in seen] == [2], "a validation held up the stop"
        else:
            progress = run_loop(objective, *arguments, validate)
    assert [step for step, _ in seen] == [2, 4, 6]
    assert [record["step"] for record in progress.validations] == [2, 4, 6]
    assert resumed.asked[0].start == 4 * BATCH_SIZE
    assert again.asked == []


class Slope:
    """One product a sample, 3 by 4 and 4 by 5, whose arithmetic is 2 * 3 * 4 * 5 forward and as much for each gradient."""

    labels = ("slope",)

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(4, 5))

    def prepare(self, indices: range):
        return torch.stack([torch.full((3, 4), float(index % 7)) for index in indices])

    def compute_losses(self, batch):
        return (batch @ self.weight - 1.0).square().flatten(1).mean(dim=1), [0] * len(batch)


def test_an_event_tells_speed_memory_and_arithmetic(tmp_path):
    slope, events = Slope(), []
    compute_losses = slope.compute_losses

    def rest(batch):
        time.sleep(0.3 if batch[0, 0, 0] == 2 * BATCH_SIZE % 7 else 0.0)
        return compute_losses(batch)

    slope.compute_losses = rest  # type: ignore[method-assign]
    resources = TrainResources(log_every_steps=1)
    run_loop(slope, {"weight": slope.weight}, plan_loop(tmp_path, 4), resources, ALONE, events.append)
    assert all(event["gigaflop_per_sample"] == pytest.approx(2 * 120e-9) for event in events)
    for event in events:
        assert event["model_flops_per_second"] == pytest.approx(240 * event["samples_per_second"])
        assert 50e6 < event["device_memory_bytes"] < 50e9
    slow, later = events[2], events[3]
    assert slow["samples_per_second"] < BATCH_SIZE / 0.3
    assert slow["eta_seconds"] == pytest.approx(BATCH_SIZE / slow["samples_per_second"])
    assert later["samples_per_second"] > BATCH_SIZE / 0.3, "a rate since the start would still show the slow step"


def test_counting_the_arithmetic_changes_nothing_and_sees_into_a_compiled_network(tmp_path):
    heard, unheard = Slope(), Slope()
    run_loop(heard, {"weight": heard.weight}, plan_loop(tmp_path / "a"), TrainResources(), ALONE, lambda _: None)
    run_loop(unheard, {"weight": unheard.weight}, plan_loop(tmp_path / "b"), TrainResources(), ALONE)
    assert torch.equal(heard.weight, unheard.weight)
    compiled = Slope()
    compiled.compute_losses = torch.compile(compiled.compute_losses)  # type: ignore[method-assign]
    assert count_flop(compiled, 0, torch.device("cpu"), is_compiled=True) == 240
    assert count_flop(Parabola(), 0, torch.device("cpu"), is_compiled=False) is None


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


def _sum_gradients_in_small_buckets(world: World) -> list[list[float]]:
    """Sum gradients of 3, 2 and 6 numbers (the latter not as they lie in memory), 5 and 1, where 6 numbers fill a message."""
    world_module._BUCKET_BYTES = 6 * 4
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in (3, 2, (2, 3), 4, 5, 1)]
    for number, parameter in enumerate(parameters):
        if number != 3:  # one that has none
            values = torch.arange(float(parameter.numel())) + 10 * number + 100 * world.rank
            parameter.grad = values.view(3, 2).T if number == 2 else values
    world.sum_gradients(parameters)
    return [parameter.grad.flatten().tolist() for parameter in parameters if parameter.grad is not None]


def _train_by_two_by_one_by_two(rank: int, folder: str, port: int) -> None:
    """Steps 1 to 3 by two processes, 4 to 6 by one, 7 to 9 by two; a signal to the last process ends the first parts."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = {"asked": []}
    with join_world("cpu", 1) as both:
        result["sums"] = _sum_gradients_in_small_buckets(both)
        for world, until in ((both, 3), (ALONE, 6), (both, 9)):
            if rank < world.size:
                objective = Parabola()
                if world.rank == world.size - 1 and until < 9:
                    signal_at(objective, until - 1)
                resources = TrainResources(device_batch_size=3)
                arguments = ({"weight": objective.weight}, plan_loop(folder, 9), resources, world)
                try:
                    result["losses"] = [record["loss"] for record in run_loop(objective, *arguments).history]
                except Stopped:
                    assert until < 9
                result["asked"].append([(indices.start, indices.stop) for indices in objective.asked])
                result["weight"] = objective.weight.tolist()
            both.wait_for_all()
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result))


def test_two_processes_one_and_two_again_see_one_stream_and_lose_nothing(tmp_path, free_tcp_port):
    spawn(_train_by_two_by_one_by_two, args=(str(tmp_path), free_tcp_port), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert [len(part) for part in first["asked"]] == [6, 9, 6]
    assert [len(part) for part in second["asked"]] == [6, 6]
    stream = [i for run in (first, second) for part in run["asked"] for ends in part for i in range(*ends)]
    assert sorted(stream) == list(range(9 * BATCH_SIZE)), "a sample came twice, or never"
    alone = Parabola()
    progress = train(tmp_path / "alone", alone, num_steps=9, device_batch_size=3)
    expected = [[0, 1, 2], [10, 11], [20, 22, 24, 21, 23, 25], [40, 41, 42, 43, 44], [50]]
    assert first["sums"] == second["sums"] == [[2 * value + 100 for value in values] for values in expected]
    assert first["weight"] == second["weight"]
    # the same sums in another order, in float32: 6e-8 a rounding, a few roundings in nine steps
    torch.testing.assert_close(torch.tensor(first["weight"]), alone.weight.detach(), rtol=1e-6, atol=1e-6)
    assert first["losses"] == pytest.approx([record["loss"] for record in progress.history], rel=1e-6)


def test_min_snr_weights_by_hand():
    # here, for the processes that this module starts need not load diffusers
    from prompt_diffusion.training.loss import weigh_by_snr

    alphas = torch.tensor([0.9, 0.5, 0.0])  # signal-to-noise ratios 9, 1, 0
    steps = torch.tensor([0, 1, 2])
    torch.testing.assert_close(weigh_by_snr(alphas, steps, 5.0, "epsilon"), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(weigh_by_snr(alphas, steps, 5.0, "v_prediction"), torch.tensor([0.6, 1.0, 1.0]))


def test_min_snr_trains_every_timestep_of_a_schedule_with_zero_terminal_snr():
    from diffusers import DDPMScheduler

    from prompt_diffusion.training.loss import weigh_by_snr
    from prompt_diffusion.training.pretrain import build_scheduler
    from prompt_diffusion.training.pretrain_config import PretrainConfig

    scheduler = DDPMScheduler.from_config(build_scheduler(PretrainConfig()).config)
    steps = torch.arange(scheduler.config["num_train_timesteps"])
    weights = weigh_by_snr(scheduler.alphas_cumprod, steps, 5.0, "v_prediction")
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert weights[-1] == pytest.approx(1.0)
    assert (weights.diff() >= -1e-6).all(), "the noisier, the heavier"
    assert weights.max() <= 1.0 + 1e-6
