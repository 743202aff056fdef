"""Every engine runs the same training to its end, whatever is killed; a limit, a mistake and a terminal are heard."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.training.config import TrainResources
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError, launch_training, write_spec
from prompt_diffusion.training.run import format_event
from prompt_diffusion.training.stage import identify_train

OFTEN = {"checkpoint_every_seconds": 1e-6, "log_every_steps": 1, "device_batch_size": 4}


def find_processes(*words):
    """Return the processes whose command line has all of the words."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if folder.name.isdigit() and all(word in line for word in words):
            found.append(int(folder.name))
    return sorted(found)


def read_history(config, inputs, store):
    manifest = open_manifest(identify_train(config, inputs).uri(store))
    table = pq.read_table(Path(manifest.ref.uri) / "losses.parquet").to_pydict()
    return manifest.counts, table


@pytest.fixture(scope="module")
def alone(train_inputs, tiny_config, tmp_path_factory):
    """Train in one process without an interruption, and return counts and losses."""
    store = str(tmp_path_factory.mktemp("alone"))
    launch_training(tiny_config, train_inputs, store, TrainResources(**OFTEN))
    return read_history(tiny_config, train_inputs, store)


def check_same_training(found, expected):
    """Check that every step was taken once, on the same samples, with the same losses up to the order of sums."""
    (counts, table), (expected_counts, expected_table) = found, expected
    assert counts == expected_counts
    for column in ("step", "vision_task", "num_samples"):
        assert table[column] == expected_table[column]
    np.testing.assert_allclose(table["loss"], expected_table["loss"], rtol=1e-3)


def test_torchrun_goes_on_after_the_loss_of_a_process(alone, train_inputs, tiny_config, tmp_path):
    killed = []

    def kill_at_step_3(event):
        if event["step"] == 3 and not killed:
            ranks = find_processes("prompt_diffusion.training.run", str(tmp_path), "-u")
            killed.append(ranks[-1])
            os.kill(killed[0], signal.SIGKILL)

    resources = TrainResources(num_processes=2, **OFTEN)
    launch_training(tiny_config, train_inputs, str(tmp_path), resources, kill_at_step_3)
    assert killed
    check_same_training(read_history(tiny_config, train_inputs, str(tmp_path)), alone)


@pytest.mark.timeout(240)
def test_ray_train_goes_on_after_the_loss_of_a_worker(alone, train_inputs, tiny_config, tmp_path):
    pytest.importorskip("ray", reason="no Ray: the extra 'ray' is not installed")
    killed, steps = [], []

    def kill_at_step_3(event):
        steps.append(event["step"])
        if event["step"] == 3 and not killed:
            killed.append(find_processes("ray::RayTrainWorker")[-1])
            os.kill(killed[0], signal.SIGKILL)

    resources = TrainResources(engine="ray", device="cpu", num_processes=2, **OFTEN)
    launch_training(tiny_config, train_inputs, str(tmp_path), resources, kill_at_step_3)
    assert killed
    assert steps[-1] == 10
    check_same_training(read_history(tiny_config, train_inputs, str(tmp_path)), alone)
