"""Every engine runs the same training to its end, whatever is killed; a limit, a mistake and a terminal are heard."""

import contextlib
import os
import pty
import shlex
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import LaunchEvent
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError, build_command, run_command
from prompt_diffusion.training.stage import Train

OFTEN = {"checkpoint_every_seconds": 1e-6, "log_every_steps": 1, "device_batch_size": 4}


def find_processes(word):
    """Return the processes below this one whose command line has the word."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def read_history(config, inputs, store):
    manifest = open_manifest(Train(config, inputs).identity.uri(store))
    table = pq.read_table(Path(manifest.ref.uri) / "losses.parquet").to_pydict()
    return manifest.counts, table


@pytest.fixture(scope="module")
def alone(train_inputs, tiny_config, tmp_path_factory):
    """Train in one process without an interruption, and return counts and losses."""
    store = str(tmp_path_factory.mktemp("alone"))
    obtain(Train(tiny_config, train_inputs), Context(store, TrainResources(**OFTEN)))
    return read_history(tiny_config, train_inputs, store)


def check_same_training(found, expected):
    """Check that every step was taken once, on the same samples, with the same losses up to the order of sums."""
    (counts, table), (expected_counts, expected_table) = found, expected
    assert counts == expected_counts
    for column in ("step", "vision_task", "num_samples"):
        assert table[column] == expected_table[column]
    np.testing.assert_allclose(table["loss"], expected_table["loss"], rtol=1e-3)


def test_torchrun_goes_on_after_the_loss_of_a_process(
    alone, train_inputs, tiny_config, tmp_path, capfd, monkeypatch, tmp_path_factory
):
    killed, temporary = [], tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("WORLD_SIZE", "7")  # left by a batch system: torchrun's own counts

    def kill_at_step_3(event):
        if getattr(event, "step", None) == 3 and not killed:
            rank = next(p for p in find_processes("training.run") if p.environ().get("LOCAL_RANK") == "1")
            killed.append(rank.pid)
            rank.kill()

    resources = TrainResources(num_processes=2, **OFTEN)
    obtain(Train(tiny_config, train_inputs), Context(str(tmp_path), resources, lambda told: kill_at_step_3(told.event)))
    assert killed
    check_same_training(read_history(tiny_config, train_inputs, str(tmp_path)), alone)
    assert "failed to connect" not in capfd.readouterr().err, "an attempt looked for the dead of the one before"
    assert not list(temporary.glob("torchelastic_*"))


@pytest.mark.timeout(300)
def test_ray_train_goes_on_after_the_loss_of_a_worker(alone, train_inputs, tiny_config, tmp_path):
    pytest.importorskip("ray", reason="no Ray: the extra 'ray' is not installed")
    killed, steps = [], []

    def kill_at_step_3(event):
        steps.append(getattr(event, "step", None))
        if getattr(event, "step", None) == 3 and not killed:
            worker = find_processes("ray::RayTrainWorker")[-1]
            killed.append(worker.pid)
            worker.kill()

    resources = TrainResources(engine="ray", device="cpu", num_processes=2, **OFTEN)
    obtain(Train(tiny_config, train_inputs), Context(str(tmp_path), resources, lambda told: kill_at_step_3(told.event)))
    assert killed
    assert steps[-1] == 10
    check_same_training(read_history(tiny_config, train_inputs, str(tmp_path)), alone)


def test_a_time_limit_stops_a_training_with_a_checkpoint(train_inputs, tiny_config, tmp_path):
    config = tiny_config.model_copy(update={"num_steps": 100_000})
    steps = []
    for limit in (20, 90):  # a busy machine may not come to the first step within the shorter one
        resources = TrainResources(
            num_processes=2, time_limit_seconds=limit, log_every_steps=1, device_batch_size=3, validate_every_steps=None
        )
        with pytest.raises(TimeLimitError, match=rf"time limit of {limit} seconds: run the same command to go on"):
            obtain(
                Train(config, train_inputs),
                Context(str(tmp_path), resources, lambda told: steps.append(getattr(told.event, "step", None))),
            )
        assert find_processes("prompt_diffusion.training") == []
        saved = [int(path.parent.name.removeprefix("step-")) for path in tmp_path.rglob("state.json")]
        if steps and steps[-1]:
            break
    assert max(saved) >= steps[-1] > 0, "what was done since the last checkpoint is lost"


def test_an_interrupt_of_the_launching_process_leaves_a_checkpoint(train_inputs, tiny_config, tmp_path):
    config = tiny_config.model_copy(update={"num_steps": 100_000})

    def interrupt(event):
        if getattr(event, "step", None) == 4:
            raise KeyboardInterrupt

    resources = TrainResources(num_processes=2, log_every_steps=1, device_batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        obtain(Train(config, train_inputs), Context(str(tmp_path), resources, lambda told: interrupt(told.event)))
    assert find_processes("prompt_diffusion.training") == []
    assert list(tmp_path.rglob("state.json"))


def test_a_mistake_that_only_the_training_can_see_is_one_sentence_and_no_restart(
    train_inputs, tiny_config, tmp_path, capfd
):
    noise = tiny_config.noise.model_copy(update={"prediction_type": "epsilon"})
    wrong = tiny_config.model_copy(update={"noise": noise})
    with pytest.raises(ValueError, match="prediction_type is 'epsilon', but base") as caught:
        obtain(Train(wrong, train_inputs), Context(str(tmp_path), TrainResources(num_processes=2, **OFTEN)))
    assert "\n" not in str(caught.value)
    assert "estart" not in capfd.readouterr().err


def test_ray_that_is_not_installed_is_named(train_inputs, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("prompt_diffusion.training.launch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the engine 'ray' needs the extra 'ray'"):
        obtain(Train(tiny_config, train_inputs), Context(str(tmp_path), TrainResources(engine="ray")))


def test_a_ray_cluster_that_does_not_answer_is_named_at_once(train_inputs, tiny_config, tmp_path):
    pytest.importorskip("ray", reason="no Ray: the extra 'ray' is not installed")
    resources = TrainResources(engine="ray", ray_address="127.0.0.1:1")
    with pytest.raises(ValueError, match=r"no Ray cluster answers at ray_address '127\.0\.0\.1:1'"):
        obtain(Train(tiny_config, train_inputs), Context(str(tmp_path), resources))


def test_the_logged_command_works_by_hand_and_speaks_to_a_person(train_inputs, tiny_config, tmp_path):
    said = []

    def stop(event):
        if not isinstance(event, LaunchEvent):
            raise RuntimeError("the launching process ends")
        said.append(event.command)

    resources = TrainResources(**OFTEN)
    with pytest.raises(RuntimeError):
        obtain(Train(tiny_config, train_inputs), Context(str(tmp_path), resources, lambda told: stop(told.event)))
    [command] = said
    terminal, end = pty.openpty()
    process = subprocess.Popen(shlex.split(command), stdout=end, stderr=subprocess.DEVNULL)
    os.close(end)
    text = b""
    with contextlib.suppress(OSError):  # a terminal ends so
        while piece := os.read(terminal, 4096):
            text += piece
    assert process.wait() == 0
    lines = text.decode().splitlines()
    assert any(line.startswith("step 9 of 10, loss ") and "samples/s" in line for line in lines)
    assert lines[-1] == f"sealed: {Train(tiny_config, train_inputs).identity.uri(str(tmp_path))}"


def test_a_users_own_modules_of_the_current_folder_are_not_taken_for_pythons(tmp_path, monkeypatch, capfd):
    """A specification that is not there ends it at once: what was imported before that is what counts."""
    (tmp_path / "random.py").write_text("raise RuntimeError('the module of the current folder was imported')\n")
    monkeypatch.chdir(tmp_path)
    resources = TrainResources(device="cpu")
    with pytest.raises(TrainingStoppedError):
        run_command(build_command(str(tmp_path / "none.json"), resources), resources, lambda event: None)
    said = capfd.readouterr().err
    assert "none.json" in said
    assert "module of the current folder" not in said
