"""Metrics by hand: speed under a clock of the test's own, losses, arithmetic."""

import math
from types import SimpleNamespace

import pytest
import torch

from prompt_diffusion.engine import metrics
from prompt_diffusion.engine.checkpoint import TrainState
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS, World
from prompt_diffusion.engine.events import StepEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.metrics import MetricsReporter, count_flops
from tests.engine.objectives import Parabola, Slope, plan_loop


def test_speed_and_time_left_are_those_since_the_last_report(tmp_path, monkeypatch):
    now, events = 100.0, []
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now))
    state = TrainState(step=2, seconds=50.0)
    reporter = MetricsReporter(
        state, plan_loop(tmp_path, 9), TrainResources(log_every_steps=2), SINGLE_PROCESS, events.append
    )
    sums = torch.tensor([[16.0, 8.0], [0.0, 0.0]], dtype=torch.float64)
    for state.step, seconds in ((3, 1.0), (4, 3.0), (5, 10.0), (6, 10.0), (7, 0.5), (8, 0.5), (9, 2.0)):
        now += seconds
        reporter.record(["line"], sums, gradient_norm=0.5)
    assert [event.step for event in events] == [4, 6, 8, 9]
    assert [event.samples_per_second for event in events] == pytest.approx([4.0, 0.8, 16.0, 4.0])
    assert [event.eta_seconds for event in events] == pytest.approx([10.0, 30.0, 0.5, 0.0])
    assert state.seconds == pytest.approx(50.0 + 27.0)


def test_a_label_without_samples_or_with_a_loss_that_is_not_finite_is_left_out(tmp_path):
    events, state = [], TrainState()
    reporter = MetricsReporter(
        state, plan_loop(tmp_path), TrainResources(log_every_steps=1), SINGLE_PROCESS, events.append
    )
    state.step = 1
    sums = torch.tensor([[6.0, 2.0], [math.nan, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    reporter.record(["depth", "hed", "seg"], sums, gradient_norm=math.nan)
    [event] = events
    assert event.losses == {"depth": 3.0}
    assert math.isnan(event.gradient_norm)
    assert state.history == [{"step": 1, "label": "depth", "loss": 3.0, "num_samples": 2}]


def test_other_processes_report_nothing(tmp_path):
    events = []
    reporter = MetricsReporter(TrainState(step=6), plan_loop(tmp_path), TrainResources(), World(1, 2), events.append)
    reporter.record(["line"], torch.ones(2, 2, dtype=torch.float64), gradient_norm=1.0)
    assert events == []


def test_a_step_event_tells_memory_and_arithmetic(tmp_path):
    slope, events = Slope(), []
    resources = TrainResources(log_every_steps=1)
    run_loop(slope, {"weight": slope.weight}, plan_loop(tmp_path, 4), resources, SINGLE_PROCESS, events.append)
    assert [event.step for event in events if isinstance(event, StepEvent)] == [1, 2, 3, 4]
    for event in events:
        assert event.gigaflop_per_sample == pytest.approx(2 * 120e-9)
        assert event.model_flops_per_second == pytest.approx(240 * event.samples_per_second)
        assert 50e6 < event.device_memory_bytes < 50e9


def test_counting_the_arithmetic_changes_nothing_and_sees_into_a_compiled_network(tmp_path):
    heard, unheard = Slope(), Slope()
    run_loop(
        heard, {"weight": heard.weight}, plan_loop(tmp_path / "a"), TrainResources(), SINGLE_PROCESS, lambda _: None
    )
    run_loop(unheard, {"weight": unheard.weight}, plan_loop(tmp_path / "b"), TrainResources(), SINGLE_PROCESS)
    assert torch.equal(heard.weight, unheard.weight)
    compiled = Slope()
    compiled.compute_losses = torch.compile(compiled.compute_losses)  # type: ignore[method-assign]
    assert count_flops(compiled, 0, torch.device("cpu"), is_compiled=True) == 240
    assert count_flops(Parabola(), 0, torch.device("cpu"), is_compiled=False) is None
