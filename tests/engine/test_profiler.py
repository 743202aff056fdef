"""The profiler's switch: off it does nothing; on it writes a trace of the steps asked for, or of those that there were."""

import gzip
import json

import pytest
import torch

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS, World
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.profiler import profile_steps
from tests.engine.objectives import Parabola, plan_loop, stop_at


def list_recorded_steps(path):
    """Return the steps of a trace, counted by the profiler from the start of its process."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")})


def test_the_steps_asked_for_are_recorded_and_change_nothing(tmp_path):
    plain, profiled = Parabola(), Parabola()
    run_loop(plain, {"weight": plain.weight}, plan_loop(tmp_path / "plain"), TrainResources(), SINGLE_PROCESS)
    assert not list(tmp_path.rglob("trace-*"))
    plan = plan_loop(tmp_path / "profiled")
    run_loop(profiled, {"weight": profiled.weight}, plan, TrainResources(profile_steps=3), SINGLE_PROCESS)
    [trace] = tmp_path.rglob("trace-*")
    assert trace == tmp_path / "profiled" / "checkpoints" / "trace-00000005.json.gz"
    assert list_recorded_steps(trace) == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]
    assert torch.equal(plain.weight, profiled.weight)


def test_a_run_that_ends_before_writes_what_it_recorded_and_a_later_one_its_own(tmp_path):
    resources = TrainResources(profile_steps=100, checkpoint_every_seconds=1e-9)
    broken, resumed = Parabola(), Parabola()
    stop_at(broken, 3)
    with pytest.raises(KeyboardInterrupt):
        run_loop(broken, {"weight": broken.weight}, plan_loop(tmp_path), resources, SINGLE_PROCESS)
    [first] = tmp_path.rglob("trace-*")
    assert list_recorded_steps(first) == ["ProfilerStep#2", "ProfilerStep#3"]
    run_loop(resumed, {"weight": resumed.weight}, plan_loop(tmp_path), resources, SINGLE_PROCESS)
    assert first.exists(), "the traces of two attempts have one name"


def test_only_the_main_process_records(tmp_path):
    with profile_steps(str(tmp_path), 0, TrainResources(profile_steps=1), World(1, 2)) as advance:
        for _ in range(4):
            advance()
    assert list(tmp_path.iterdir()) == []
