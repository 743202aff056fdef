"""Property 3 of the house: 10 steps equal 5 + kill -9 + 5, bit for bit, with the same stream of sample ids."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.training.launch import LAUNCHER_VARIABLE
from prompt_diffusion.training.stage import Train, TrainSpec


def start(config, inputs, store, folder, resources):
    spec = TrainSpec(config=config, inputs=inputs, store_root=store, resources=resources)
    (folder / "spec.json").write_text(spec.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "prompt_diffusion.training.run", str(folder / "spec.json")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def read_events(process):
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def read_result(config, inputs, store):
    manifest = open_manifest(Train(config, inputs).identity.uri(store))
    weights = {
        part: safetensors.numpy.load(manifest.read_file(f"pipeline/{part}/diffusion_pytorch_model.safetensors"))
        for part in ("controlnet", "unet")
    }
    return weights, manifest.read_file("losses.parquet"), manifest.read_file("grid.png")


@pytest.fixture
def resources():
    return TrainResources(checkpoint_every_seconds=1e-6, log_every_steps=1, device_batch_size=4)


@pytest.fixture(scope="module")
def whole(train_inputs, tiny_config, tmp_path_factory):
    """Train without an interruption, and return what came out."""
    folder = tmp_path_factory.mktemp("whole")
    resources = TrainResources(log_every_steps=1, device_batch_size=4)
    process = start(tiny_config, train_inputs, str(folder), folder, resources)
    assert list(read_events(process))[-1]["kind"] == "sealed"
    assert process.wait() == 0
    return read_result(tiny_config, train_inputs, str(folder))


@pytest.mark.parametrize(("kill", "code", "num_kills"), [(signal.SIGKILL, -9, 2), (signal.SIGTERM, 75, 1)])
def test_ten_steps_equal_some_and_a_kill_and_the_rest_bit_for_bit(
    whole, train_inputs, tiny_config, tmp_path, resources, kill, code, num_kills
):
    seed = random.randrange(10**6)
    ends = sorted(random.Random(seed).sample(range(3, 9), num_kills))
    for end in ends:
        process = start(tiny_config, train_inputs, str(tmp_path), tmp_path, resources)
        for event in read_events(process):
            if event.get("step", 0) >= end:
                process.send_signal(kill)
                break
        process.stdout.read()
        assert process.wait() == code, f"seed {seed}"
    again = start(tiny_config, train_inputs, str(tmp_path), tmp_path, resources)
    steps = [event["step"] for event in read_events(again) if "step" in event]
    assert again.wait() == 0
    assert steps[0] > 1, f"the last run began at the beginning (seed {seed})"
    weights, losses, grid = read_result(tiny_config, train_inputs, str(tmp_path))
    for part, expected in whole[0].items():
        assert weights[part].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(weights[part][name], value, err_msg=name)
    # the losses of every step and vision task: another sample anywhere in the stream would show here
    assert losses == whole[1]
    assert grid == whole[2]


def test_children_stop_when_the_launching_process_is_gone(train_inputs, tiny_config, tmp_path):
    config = tiny_config.model_copy(update={"num_steps": 100_000})
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    spec = TrainSpec(
        config=config,
        inputs=train_inputs,
        store_root=str(tmp_path),
        resources=TrainResources(log_every_steps=1),
    )
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    child = subprocess.Popen(
        [sys.executable, "-m", "prompt_diffusion.training.run", str(tmp_path / "spec.json")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {LAUNCHER_VARIABLE: str(launcher.pid)},
    )
    next(read_events(child))
    launcher.kill()
    launcher.wait()
    started = time.monotonic()
    child.stdout.read()
    assert child.wait() == 75
    assert time.monotonic() - started < 60
    assert list((tmp_path / "train").rglob("state.json")), "it left no checkpoint to go on from"
