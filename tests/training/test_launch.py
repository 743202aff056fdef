"""Every engine runs the same training to its end, whatever is killed; a limit, a mistake and a terminal are heard.

torchrun and Ray train once each; what else the launching process does is seen with a stub that only speaks as a training does.
"""

import contextlib
import json
import os
import pty
import shlex
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import LaunchEvent, StepEvent
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training import launch
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError, build_command, run_command
from prompt_diffusion.training.stage import Train, write_spec
from tests.training import stub_training
from tests.training.held_training import build_held_python
from tests.warm import WarmProcess, run_module

pytestmark = pytest.mark.slow

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


def train(config, inputs, folder, resources, on_event=lambda event: None):
    """Obtain a training that tells its events to that function."""
    return obtain(Train(config, inputs), Context(str(folder), resources, on_event))


@pytest.fixture(scope="module")
def alone(train_inputs, tiny_config, tmp_path_factory):
    """Train in one process without an interruption, and return counts and losses."""
    store = tmp_path_factory.mktemp("alone")
    spec = write_spec(Train(tiny_config, train_inputs), str(store), TrainResources(**OFTEN))
    assert WarmProcess(run_module, "prompt_diffusion.training.run", spec).wait() == 0
    return read_history(tiny_config, train_inputs, str(store))


def check_same_training(found, expected):
    """Check that every step was taken once, on the same samples, with the same losses up to the order of sums."""
    (counts, table), (expected_counts, expected_table) = found, expected
    assert (counts.pop("processes"), expected_counts.get("processes")) == (2, 1)
    assert counts == {name: count for name, count in expected_counts.items() if name != "processes"}
    for column in ("step", "vision_task", "num_samples"):
        assert table[column] == expected_table[column]
    np.testing.assert_allclose(table["loss"], expected_table["loss"], rtol=1e-3)


def test_torchrun_goes_on_after_the_loss_of_a_process(
    alone, train_inputs, tiny_config, tmp_path, capfd, monkeypatch, tmp_path_factory
):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("WORLD_SIZE", "7")  # left by a batch system: torchrun's own counts
    program, go = build_held_python(tmp_path)
    monkeypatch.setattr(sys, "executable", program)
    killed = []

    def kill_at_step_3(event):
        if getattr(event, "step", None) == 3 and not killed:
            rank = next(p for p in find_processes("held_training") if p.environ().get("LOCAL_RANK") == "1")
            killed.append(rank.pid)
            rank.kill()
            go.touch()

    resources = TrainResources(num_processes=2, **OFTEN)
    train(tiny_config, train_inputs, tmp_path, resources, kill_at_step_3)
    assert killed
    check_same_training(read_history(tiny_config, train_inputs, str(tmp_path)), alone)
    assert "failed to connect" not in capfd.readouterr().err, "an attempt looked for the dead of the one before"
    assert not list(temporary.glob("torchelastic_*"))


def test_ray_train_goes_on_after_the_loss_of_a_worker(alone, train_inputs, tiny_config, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="no Ray: the extra 'ray' is not installed")
    program, go = build_held_python(tmp_path)
    monkeypatch.setattr(sys, "executable", program)
    killed, steps = [], []

    def kill_at_step_3(event):
        steps.append(getattr(event, "step", None))
        if getattr(event, "step", None) == 3 and not killed:
            worker = find_processes("ray::RayTrainWorker")[-1]
            killed.append(worker.pid)
            worker.kill()
            go.touch()

    resources = TrainResources(engine="ray", device="cpu", num_processes=2, **OFTEN)
    train(tiny_config, train_inputs, tmp_path, resources, kill_at_step_3)
    assert killed
    assert steps[-1] == 10
    check_same_training(read_history(tiny_config, train_inputs, str(tmp_path)), alone)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Return what puts a stub in the place of every python that is launched, and says what it does."""
    monkeypatch.setattr(sys, "executable", stub_training.build_stub(tmp_path))
    return lambda what: monkeypatch.setenv(stub_training.VARIABLE, str(what))


def test_a_time_limit_asks_the_training_to_save_and_leaves_no_process(train_inputs, tiny_config, tmp_path, stub):
    stub("steps")
    steps = []
    for limit in (1, 8, 64, 512):  # a busy machine may not come to the first step within the shorter ones
        with pytest.raises(TimeLimitError, match=rf"time limit of {limit} seconds: run the same command to go on"):
            train(
                tiny_config,
                train_inputs,
                tmp_path,
                TrainResources(time_limit_seconds=limit),
                lambda event: steps.append(getattr(event, "step", None)),
            )
        assert find_processes("stub_training") == []
        saved = list(tmp_path.rglob("saved-0"))
        if saved:
            break
    assert int(saved[0].read_text()) == steps[-1]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_interrupt_of_the_launching_process_asks_the_training_to_save_and_leaves_no_process(
    train_inputs, tiny_config, tmp_path, stub, num_processes
):
    stub("steps")
    started = set()

    def interrupt(event):
        # torchrun starts its processes one by one: the last has begun once it says so
        started.update(path.name for path in tmp_path.rglob("began-*"))
        if getattr(event, "step", 0) >= 4 and len(started) == num_processes:
            raise KeyboardInterrupt

    resources = TrainResources(num_processes=num_processes)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, train_inputs, tmp_path, resources, interrupt)
    assert find_processes("stub_training") == []
    assert len(list(tmp_path.rglob("saved-*"))) == num_processes


def test_a_training_that_does_not_stop_is_killed(train_inputs, tiny_config, tmp_path, stub, monkeypatch):
    stub("deaf")
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.1)

    def interrupt(event):
        if isinstance(event, StepEvent):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, train_inputs, tmp_path, TrainResources(), interrupt)
    assert find_processes("stub_training") == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_mistake_that_only_the_training_can_see_is_one_sentence_and_no_restart(
    train_inputs, tiny_config, tmp_path, capfd, stub, num_processes
):
    stub("mistake")
    with pytest.raises(ValueError, match="prediction_type is 'epsilon', but base") as caught:
        train(tiny_config, train_inputs, tmp_path, TrainResources(num_processes=num_processes))
    assert str(caught.value) == stub_training.SENTENCE
    assert "estart" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (75, "the training was stopped: run the same command to go on"),
        (0, "the training was stopped: run the same command to go on"),
        (1, "the training process ended with exit code 1; its last checkpoint is whole"),
        (137, "the training process ended with exit code 137"),
    ],
)
def test_a_training_that_ends_without_a_seal_has_stopped_and_says_how(
    train_inputs, tiny_config, tmp_path, stub, code, sentence
):
    stub(code)
    with pytest.raises(TrainingStoppedError, match=sentence):
        train(tiny_config, train_inputs, tmp_path, TrainResources())


def test_the_sealed_reference_is_returned_and_what_is_no_event_is_nobody_s(train_inputs, tiny_config, tmp_path, stub):
    stub("sealed")
    events = []
    ref = train(tiny_config, train_inputs, tmp_path, TrainResources(), events.append)
    assert ref == ManifestRef(**stub_training.SEALED)
    assert [event.kind for event in events] == ["launch", "step"]


@pytest.mark.parametrize(("num_processes", "code"), [(1, 2), (2, 0)])
def test_a_training_tells_a_mistake_as_an_event_and_under_torchrun_ends_well(
    train_inputs, tiny_config, tmp_path, num_processes, code
):
    noise = tiny_config.noise.model_copy(update={"prediction_type": "epsilon"})
    wrong = tiny_config.model_copy(update={"noise": noise})
    spec = write_spec(Train(wrong, train_inputs), str(tmp_path), TrainResources(num_processes=num_processes, **OFTEN))
    # a training of one process heeds no such variable: a batch system may have left it
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    child = WarmProcess(run_module, "prompt_diffusion.training.run", spec, environment=environment)
    lines = list(child.read_lines())
    assert child.wait() == code
    error = json.loads(lines[-1])["message"]
    assert error.startswith("noise.prediction_type is 'epsilon', but base")
    assert "\n" not in error


def test_ray_that_is_not_installed_is_named(train_inputs, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("prompt_diffusion.training.stage.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the engine 'ray' needs the extra 'ray'"):
        train(tiny_config, train_inputs, tmp_path, TrainResources(engine="ray"))


def test_a_ray_cluster_that_does_not_answer_is_named_at_once(train_inputs, tiny_config, tmp_path):
    pytest.importorskip("ray", reason="no Ray: the extra 'ray' is not installed")
    resources = TrainResources(engine="ray", ray_address="127.0.0.1:1")
    spec = write_spec(Train(tiny_config, train_inputs), str(tmp_path), resources)
    child = WarmProcess(run_module, "prompt_diffusion.training.launch_ray", spec)
    lines = list(child.read_lines())
    assert child.wait() == 2
    assert json.loads(lines[-1])["message"].startswith("no Ray cluster answers at ray_address '127.0.0.1:1'")


def test_the_logged_command_works_by_hand_and_speaks_to_a_person(train_inputs, tiny_config, tmp_path, monkeypatch):
    said = []

    def stop(event):
        assert isinstance(event, LaunchEvent)
        said.append(event.command)
        raise RuntimeError("the launching process ends")

    with pytest.raises(RuntimeError):
        train(tiny_config, train_inputs, tmp_path, TrainResources(**OFTEN), stop)
    python, option, *program = shlex.split(said[0])
    assert (python, option) == (sys.executable, "-m")
    terminal, end = pty.openpty()
    process = WarmProcess(run_module, *program, out=end)
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
