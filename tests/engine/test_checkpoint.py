"""Checkpoints: which are kept, that they are whole or do not count, and that writing them does not hold up the training."""

import itertools
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from prompt_diffusion.engine.checkpoint import (
    Progress,
    check_room,
    choose_kept,
    estimate_checkpoint_bytes,
    list_checkpoints,
    restore_checkpoint,
)
from prompt_diffusion.engine.checkpoint_writer import CheckpointWriter
from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.distributed import ALONE
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.engine.optimizer import build_optimizers
from prompt_diffusion.store import storage
from tests.sharing import wait_until
from tests.warm import WarmProcess

NUM_STEPS = 6


def test_kept_are_the_two_newest_the_best_and_the_first_at_or_after_each_mark():
    steps, losses = range(0, 1001, 10), {300: 0.5, 600: 0.4, 900: 0.6}
    assert choose_kept(steps, losses, 1000, 3) == {250, 500, 750, 600, 990, 1000}
    assert choose_kept(steps, {}, 1000, 0) == {990, 1000}
    assert choose_kept([333, 334], {}, 1000, 3) == {333, 334}
    assert choose_kept([], {}, 1000, 3) == set()
    assert choose_kept(range(5), {0: math.nan, 1: 2.0, 2: 2.0, 9: 1.0}, 1000, 0) == {1, 3, 4}


def test_to_drop_as_one_goes_leaves_what_dropping_at_the_end_would():
    """Over every set of saved steps, every two losses and every number of marks of a short run."""
    for saved in itertools.product([False, True], repeat=NUM_STEPS):
        steps = [step for step in range(1, NUM_STEPS + 1) if saved[step - 1]]
        for num_spaced in range(4):
            for first, second in itertools.permutations(steps, 2):
                losses = {first: 1.0, second: 2.0}
                present: set[int] = set()
                for step in steps:
                    known = {at: loss for at, loss in losses.items() if at <= step}
                    present = choose_kept(present | {step}, known, NUM_STEPS, num_spaced)
                    assert step in present
                    assert len(present) <= 3 + num_spaced
                    assert present >= {min(known, key=known.__getitem__)} if known else True
                assert present == choose_kept(steps, losses, NUM_STEPS, num_spaced)
                assert present >= set(steps[-2:])


class Model:
    """Weights with an optimizer that has stepped, so that a checkpoint has something of everything."""

    def __init__(self, size: int = 4, name: str = "muon") -> None:
        torch.manual_seed(0)
        self.parameters = {
            "matrix": torch.nn.Parameter(torch.randn(size, size, 1, 1).to(memory_format=torch.channels_last)),
            "bias": torch.nn.Parameter(torch.randn(size)),
        }
        self.config = OptimizerConfig(name=name, ema_decay=0.9)
        self.optimizers = build_optimizers(self.parameters, self.config)
        self.averages = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.step()

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()

    def save(self, writer: CheckpointWriter, progress: Progress) -> None:
        writer.save(self.parameters, self.optimizers, progress, self.averages)

    def restore(self, folder: str) -> Progress:
        return restore_checkpoint(folder, self.parameters, self.optimizers, self.averages)


def write_run(folder: str, steps: range, validations: dict[int, float]) -> Progress:
    """Save a checkpoint at each step of a run, its weights all the number of the step."""
    model, progress = Model(), Progress()
    with CheckpointWriter(folder, steps.stop - 1, TrainResources()) as writer:
        for progress.step in steps:
            with torch.no_grad():
                model.parameters["bias"].fill_(progress.step)
            progress.history.append({"step": progress.step, "label": "a", "loss": 1.0, "num_samples": 1})
            if progress.step in validations:
                progress.validations.append({"step": progress.step, "loss": validations[progress.step]})
            model.save(writer, progress)
    return progress


@pytest.mark.parametrize("store", ["folder", "s3"])
def test_a_run_leaves_whole_checkpoints_of_the_steps_that_are_kept_and_nothing_else(store, tmp_path, request):
    root = str(tmp_path) if store == "folder" else request.getfixturevalue("s3_store")
    folder = storage.join_uri(root, "checkpoints")
    storage.write_bytes(storage.join_uri(folder, "step-00000003", "weights.safetensors"), b"what a killed run left")
    progress = write_run(folder, range(4, 13), {6: 1.0, 8: 2.0})
    names = [f"step-{step:08d}" for step in (4, 6, 9, 11, 12)]
    assert list_checkpoints(folder) == names
    assert {name.split("/")[0] for name in storage.list_files(folder)} == set(names)
    model = Model()
    assert model.restore(folder) == progress
    assert torch.equal(model.parameters["bias"], torch.full((4,), 12.0))
    # the newest is damaged: the one before counts
    storage.write_bytes(storage.join_uri(folder, names[-1], "optimizer.safetensors"), b"other bytes")
    assert model.restore(folder).step == 11


def test_what_is_written_is_the_state_of_the_moment_of_saving(tmp_path):
    folder, model, progress = str(tmp_path), Model(size=600), Progress(step=1)
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    with CheckpointWriter(folder, 10, TrainResources()) as writer:
        model.save(writer, progress)
        model.step()
        progress.step, progress.num_skipped = 2, 7
        progress.history.append({"step": 2})
    assert list_checkpoints(folder) == ["step-00000001"]
    restored = Model(size=600)
    assert restored.restore(folder) == Progress(step=1)
    assert all(torch.equal(restored.parameters[name], value) for name, value in before.items())


def test_other_weights_than_the_models_are_refused(tmp_path):
    write_run(str(tmp_path), range(1, 2), {})
    with pytest.raises(ValueError, match=r"step-00000001 holds other weights than this model trains"):
        Model(size=5).restore(str(tmp_path))


class Line:
    """Each sample pulls the weights by one."""

    labels = ("line",)

    def __init__(self, size: int = 3) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def prepare(self, indices: range):
        return indices

    def compute_losses(self, batch):
        return self.weight.sum().expand(len(batch)), [0] * len(batch)


def run_line(folder: Path, line: Line, num_steps: int, every: float = 1e-9) -> Progress:
    plan = LoopPlan(num_steps, 2, OptimizerConfig(learning_rate=0.1), str(folder))
    resources = TrainResources(checkpoint_every_seconds=every)
    return run_loop(line, {"weight": line.weight}, plan, resources, ALONE)


def test_an_error_of_the_writer_ends_the_run(tmp_path):
    for step in (1, 4):
        (tmp_path / str(step) / f"step-0000000{step}" / "weights.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write .*step-00000001/weights.safetensors: .*[Ii]s a directory"):
        run_line(tmp_path / "1", Line(), num_steps=2000)
    with pytest.raises(OSError, match=r"cannot write .*step-00000004"):
        run_line(tmp_path / "4", Line(), num_steps=4, every=1e9)


def test_the_error_that_ends_a_run_is_not_hidden_by_the_writers(tmp_path, caplog):
    (tmp_path / "step-00000001" / "weights.safetensors").mkdir(parents=True)
    line = Line()
    compute_losses = line.compute_losses

    def fail(batch):
        if batch.start == 2:
            raise ZeroDivisionError
        return compute_losses(batch)

    line.compute_losses = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run_line(tmp_path, line, num_steps=2000)
    assert "the last checkpoint could not be written" in caplog.text


def write_long(folder: Path) -> None:
    run_line(folder, Line(6_000_000), num_steps=1_000_000)


def test_a_kill_in_the_middle_of_an_upload_leaves_the_checkpoint_before_it(tmp_path):
    """24 MB of weights are on the disk, their 48 MB of optimizer state and the seal are not yet."""
    child = WarmProcess(write_long, tmp_path)
    try:
        for newest in _watch(tmp_path):
            if len(list_checkpoints(str(tmp_path))) < 2 or not (newest / "weights.safetensors").exists():
                continue
            child.send_signal(signal.SIGSTOP)
            wait_until(lambda: _is_stopped(child.pid), "the stop of all threads")
            if not (newest / "state.json").exists():
                break
            child.send_signal(signal.SIGCONT)  # that upload was over in the meantime: wait for the next one
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (newest / "weights.safetensors").exists()
    assert not (newest / "state.json").exists(), "the upload was over before the kill"
    whole = list_checkpoints(str(tmp_path))[-1]
    line = Line(6_000_000)
    last = int(whole.removeprefix("step-"))
    assert run_line(tmp_path, line, num_steps=last).step == last
    again = Line(6_000_000)
    (optimizer,) = build_optimizers({"weight": again.weight}, OptimizerConfig(learning_rate=0.1))
    for _ in range(last):
        again.weight.grad = torch.ones_like(again.weight)
        optimizer.step()
    assert torch.equal(line.weight, again.weight)


def _is_stopped(pid: int) -> bool:
    """Say whether every thread of a process rests."""
    states = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)


def _watch(folder: Path):
    """Yield, again and again, the newest folder without a seal."""
    while True:
        open_ones = [path for path in folder.glob("step-*") if not (path / "state.json").exists()]
        if open_ones:
            yield max(open_ones)
        time.sleep(0.001)


def test_the_estimate_is_what_a_checkpoint_takes(tmp_path):
    for name in ("muon", "adamw"):
        folder, model = tmp_path / name, Model(size=64, name=name)
        with CheckpointWriter(str(folder), 10, TrainResources()) as writer:
            model.save(writer, Progress(step=1))
        taken = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        estimate = estimate_checkpoint_bytes(model.parameters, model.config)
        assert estimate <= taken < estimate + 4000  # the files' headers


def test_a_disk_without_room_is_said_before_the_first_step(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    folder = str(tmp_path / "not" / "yet" / "there")
    with pytest.raises(ValueError, match=rf"3 checkpoints of this training take .* GB, and the disk of {folder} has"):
        check_room(folder, free // 2)
    check_room(folder, free // 4)
    # a run that goes on has two of the three already
    write_run(folder, range(1, 3), {})
    check_room(folder, free // 2)
    check_room("s3://bucket/checkpoints", free)

    line = Line()
    line.weight = torch.nn.Parameter(torch.empty(free, device="meta"))
    with pytest.raises(ValueError, match=r"take .* GB, and the disk of .* has .* GB free"):
        run_line(tmp_path, line, num_steps=1)


def test_a_slow_store_delays_checkpoints_and_not_the_training(tmp_path):
    folder, model = str(tmp_path), Model()
    resources = TrainResources(checkpoint_every_seconds=1e-9)
    # the writer's thread waits at a pipe that nobody writes to for now, as it would for a store that does not answer
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with CheckpointWriter(folder, 10, resources) as writer:
        assert writer.is_due
        writer._under_way = writer._pool.submit(pipe.read_text)
        assert not writer.is_due
        pipe.write_text("the store answers")
        writer.wait()
        assert writer.is_due
        model.save(writer, Progress(step=1))
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["step"] == 1
