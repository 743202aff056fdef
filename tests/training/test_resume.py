"""Property 3 of the house: 10 steps equal 5 + kill -9 + 5, bit for bit, with the same stream of sample ids."""

import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.training.launch import LAUNCHER_VARIABLE
from prompt_diffusion.training.stage import Train, TrainSpec
from tests.warm import WarmProcess, run_module

pytestmark = pytest.mark.slow

PROGRAM = "prompt_diffusion.training.run"


def write_spec(config, inputs, folder, **resources):
    spec = TrainSpec(
        config=config,
        inputs=inputs,
        store_root=str(folder),
        resources=TrainResources(**{"log_every_steps": 1, "device_batch_size": 4} | resources),
    )
    (folder / "spec.json").write_text(spec.model_dump_json())
    return str(folder / "spec.json")


def read_events(process):
    for line in process.read_lines():
        if line.startswith("{"):
            yield json.loads(line)


def read_result(config, inputs, store):
    manifest = open_manifest(Train(config, inputs).identity.uri(store))
    weights = {
        part: safetensors.numpy.load(manifest.read_file(f"pipeline/{part}/diffusion_pytorch_model.safetensors"))
        for part in ("controlnet", "unet")
    }
    return weights, manifest.read_file("losses.parquet"), manifest.read_file("grid.png")


@pytest.fixture(scope="module")
def whole(train_inputs, tiny_config, tmp_path_factory):
    """Train without an interruption, and return what came out."""
    folder = tmp_path_factory.mktemp("whole")
    process = WarmProcess(run_module, PROGRAM, write_spec(tiny_config, train_inputs, folder))
    assert list(read_events(process))[-1]["kind"] == "sealed"
    assert process.wait() == 0
    return read_result(tiny_config, train_inputs, str(folder))


def train_and_stop_at(spec, step, delay_seconds, number):
    """Train, and send this process a signal that long after a step; before step 9 is over it has come."""
    from prompt_diffusion.training import run

    emit, sent = run.emit, threading.Event()

    def send():
        os.kill(os.getpid(), number)
        sent.set()

    def emit_and_stop(event):
        emit(event)
        if event.kind == "step" and event.step == step:
            threading.Timer(delay_seconds, send).start()
        if event.kind == "step" and event.step == 9:
            sent.wait()

    run.emit = emit_and_stop
    sys.exit(run.main(spec))


@pytest.mark.parametrize(("kill", "code", "num_kills"), [(signal.SIGKILL, -9, 2), (signal.SIGTERM, 75, 1)])
def test_ten_steps_equal_some_and_a_kill_and_the_rest_bit_for_bit(
    whole, train_inputs, tiny_config, tmp_path, kill, code, num_kills
):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    draw = random.Random(seed)
    spec = write_spec(tiny_config, train_inputs, tmp_path, checkpoint_every_seconds=1e-6)
    for end in sorted(draw.sample(range(3, 9), num_kills)):
        process = WarmProcess(train_and_stop_at, spec, end, draw.uniform(0, 0.1), kill)
        assert process.wait() == code
    again = WarmProcess(run_module, PROGRAM, spec)
    steps = [event["step"] for event in read_events(again) if event["kind"] == "step"]
    assert again.wait() == 0
    assert steps[0] > 1, "the last run began at the beginning"
    weights, losses, grid = read_result(tiny_config, train_inputs, str(tmp_path))
    for part, expected in whole[0].items():
        assert weights[part].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(weights[part][name], value, err_msg=name)
    # the losses of every step and vision task: another sample anywhere in the stream would show here
    assert losses == whole[1]
    assert grid == whole[2]


@pytest.fixture
def launcher():
    """Start a process that trainings can end with."""
    process = subprocess.Popen(["sleep", "infinity"])
    yield process
    process.kill()
    process.wait()


def train_and_wait(spec, where):
    """Train, but say so and wait for ever, before the loop or after it."""
    from prompt_diffusion.training import run, train

    run_loop = train.run_loop

    def run_loop_and_wait(*arguments, **options):
        progress = run_loop(*arguments, **options) if where == "after" else None
        print("waits", flush=True)  # noqa: T201
        threading.Event().wait()
        return progress

    train.run_loop = run_loop_and_wait
    sys.exit(run.main(spec))


def list_saved(folder):
    return sorted(path.parent.name for path in (folder / "train").rglob("state.json"))


def end_launcher(launcher, child, line):
    """Kill the launching process at a line of the child's, and return the exit code of the child."""
    assert any(line in said for said in child.read_lines())
    launcher.kill()
    launcher.wait()
    return child.wait()


def test_a_child_whose_launcher_goes_before_the_loop_stops_and_leaves_nothing(
    train_inputs, tiny_config, tmp_path, launcher
):
    spec = write_spec(tiny_config, train_inputs, tmp_path)
    environment = os.environ | {LAUNCHER_VARIABLE: str(launcher.pid)}
    child = WarmProcess(train_and_wait, spec, "before", environment=environment)
    assert end_launcher(launcher, child, "waits") == 75
    assert not (tmp_path / "train").exists()


def test_a_child_whose_launcher_goes_in_the_loop_stops_and_leaves_a_checkpoint(
    train_inputs, tiny_config, tmp_path, launcher
):
    config = tiny_config.model_copy(update={"num_steps": 100_000})
    environment = os.environ | {LAUNCHER_VARIABLE: str(launcher.pid)}
    child = WarmProcess(run_module, PROGRAM, write_spec(config, train_inputs, tmp_path), environment=environment)
    assert end_launcher(launcher, child, '"step":2,') == 75
    [saved] = list_saved(tmp_path)
    assert saved >= "step-00000002"


def test_a_child_whose_launcher_goes_after_the_loop_stops_and_no_step_is_taken_again(
    train_inputs, tiny_config, tmp_path, launcher
):
    config = tiny_config.model_copy(update={"num_steps": 2})
    spec = write_spec(config, train_inputs, tmp_path)
    environment = os.environ | {LAUNCHER_VARIABLE: str(launcher.pid)}
    child = WarmProcess(train_and_wait, spec, "after", environment=environment)
    assert end_launcher(launcher, child, "waits") == 75
    assert list_saved(tmp_path) == ["step-00000002"]
    again = WarmProcess(run_module, PROGRAM, spec)
    events = list(read_events(again))
    assert again.wait() == 0
    assert events[-1]["kind"] == "sealed"
    assert "step" not in {event["kind"] for event in events}
