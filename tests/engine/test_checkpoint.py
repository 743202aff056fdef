"""Checkpoints: which are kept, that they are whole or do not count, and that writing them does not hold up the training."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from prompt_diffusion.engine.checkpoint import (
    TrainState,
    check_room,
    choose_kept,
    estimate_checkpoint_bytes,
    list_checkpoints,
    restore_checkpoint,
)
from prompt_diffusion.engine.checkpoint_writer import CheckpointWriter
from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.optimizer import build_optimizers
from prompt_diffusion.store import storage
from prompt_diffusion.store.uris import join_uri
from tests.engine.objectives import Line, run_line

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
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.step()

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()

    def save(self, writer: CheckpointWriter, state: TrainState) -> None:
        writer.save(self.parameters, self.optimizers, state, self.ema)

    def restore(self, folder: str) -> TrainState:
        return restore_checkpoint(folder, self.parameters, self.optimizers, self.ema)


def write_run(folder: str, steps: range, validations: dict[int, float]) -> TrainState:
    """Save a checkpoint at each step of a run, its weights all the number of the step."""
    model, state = Model(), TrainState()
    with CheckpointWriter(folder, steps.stop - 1, TrainResources()) as writer:
        for state.step in steps:
            with torch.no_grad():
                model.parameters["bias"].fill_(state.step)
            state.history.append({"step": state.step, "label": "a", "loss": 1.0, "num_samples": 1})
            if state.step in validations:
                state.validations.append({"step": state.step, "loss": validations[state.step]})
            model.save(writer, state)
    return state


@pytest.mark.parametrize("store", ["folder", "s3"])
def test_a_run_leaves_whole_checkpoints_of_the_steps_that_are_kept_and_nothing_else(store, tmp_path, request):
    root = str(tmp_path) if store == "folder" else request.getfixturevalue("s3_store")
    folder = join_uri(root, "checkpoints")
    storage.write_bytes(join_uri(folder, "step-00000003", "weights.safetensors"), b"what a killed run left")
    state = write_run(folder, range(4, 13), {6: 1.0, 8: 2.0})
    names = [f"step-{step:08d}" for step in (4, 6, 9, 11, 12)]
    assert list_checkpoints(folder) == names
    assert {name.split("/")[0] for name in storage.list_files(folder)} == set(names)
    model = Model()
    assert model.restore(folder) == state
    assert torch.equal(model.parameters["bias"], torch.full((4,), 12.0))
    # the newest is damaged: the one before counts
    storage.write_bytes(join_uri(folder, names[-1], "optimizer.safetensors"), b"other bytes")
    assert model.restore(folder).step == 11


def test_what_is_written_is_the_state_of_the_moment_of_saving(tmp_path):
    folder, model, state = str(tmp_path), Model(size=600), TrainState(step=1)
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    with CheckpointWriter(folder, 10, TrainResources()) as writer:
        model.save(writer, state)
        model.step()
        state.step, state.num_skipped = 2, 7
        state.history.append({"step": 2})
    assert list_checkpoints(folder) == ["step-00000001"]
    restored = Model(size=600)
    assert restored.restore(folder) == TrainState(step=1)
    assert all(torch.equal(restored.parameters[name], value) for name, value in before.items())


def test_a_checkpoint_of_an_earlier_version_still_gives_its_ema(tmp_path):
    """Its name used to be ``averages.safetensors``."""
    folder, model = tmp_path / "step-00000001", Model()
    for ema in model.ema.values():
        ema.fill_(3.0)
    with CheckpointWriter(str(tmp_path), 10, TrainResources()) as writer:
        model.save(writer, TrainState(step=1))
    (folder / "ema.safetensors").rename(folder / "averages.safetensors")
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]  # nor did it have that
    state["digests"]["averages.safetensors"] = state["digests"].pop("ema.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    restored = Model()
    assert restored.restore(str(tmp_path)) == TrainState(step=1)
    assert all(torch.equal(ema, torch.full_like(ema, 3.0)) for ema in restored.ema.values())


def test_other_weights_than_the_models_are_refused(tmp_path):
    write_run(str(tmp_path), range(1, 2), {})
    with pytest.raises(ValueError, match=r"step-00000001 holds other weights than this model trains"):
        Model(size=5).restore(str(tmp_path))


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


_KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from prompt_diffusion.engine import checkpoint
from tests.engine.objectives import Line, run_line

write, num_written = checkpoint._write_tensors, 0

def write_until_killed(uri, tensors):
    global num_written
    num_written += uri.endswith("optimizer.safetensors")
    if num_written == 3:
        Path(uri).write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(uri, tensors)

checkpoint._write_tensors = write_until_killed
run_line(Path(sys.argv[1]), Line(), num_steps=1_000_000)
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_it(tmp_path):
    """The third checkpoint has its weights and half of its optimizer state when the process is killed."""
    killed = subprocess.run([sys.executable, "-c", _KILLED_WHILE_WRITING, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    *whole, broken = sorted(path.name for path in tmp_path.iterdir())
    assert list_checkpoints(str(tmp_path)) == whole
    assert len(whole) == 2
    assert (tmp_path / broken / "weights.safetensors").exists()
    line, last = Line(), int(whole[-1].removeprefix("step-"))
    assert run_line(tmp_path, line, num_steps=last).step == last
    again = Line()
    (optimizer,) = build_optimizers({"weight": again.weight}, OptimizerConfig(learning_rate=0.1))
    for _ in range(last):
        again.weight.grad = torch.ones_like(again.weight)
        optimizer.step()
    assert torch.equal(line.weight, again.weight)


def test_the_estimate_is_what_a_checkpoint_takes(tmp_path):
    for name in ("muon", "adamw"):
        folder, model = tmp_path / name, Model(size=64, name=name)
        with CheckpointWriter(str(folder), 10, TrainResources()) as writer:
            model.save(writer, TrainState(step=1))
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
        writer._pending = writer._pool.submit(pipe.read_text)
        assert not writer.is_due
        pipe.write_text("the store answers")
        writer.wait()
        assert writer.is_due
        model.save(writer, TrainState(step=1))
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["step"] == 1
