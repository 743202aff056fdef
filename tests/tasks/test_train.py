"""Trainings hear of an interrupt in whatever thread they run, a stopped one is not launched again, all say where they are."""

import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prefect import task
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.states import State

from prompt_diffusion.engine.events import Event, LaunchEvent, StepEvent, ValidationEvent, describe
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError
from prompt_diffusion.training.stage import Train
from tasks import progress
from tasks.progress import log_training, show_progress
from tasks.retries import is_transient
from tasks.train import stop_on_interrupt


def ask_to_go_on() -> bool:
    @task
    def toy() -> None: ...

    state: State[None] = State(type=StateType.FAILED, data=TrainingStoppedError("killed"))
    return is_transient(toy, TaskRun(task_key="toy", dynamic_key="0"), state)


def test_a_training_that_was_killed_goes_on() -> None:
    with stop_on_interrupt():
        assert ask_to_go_on()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_after_an_interrupt_no_training_goes_on_until_the_next_run(interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt), stop_on_interrupt():
        raise interrupt
    assert not ask_to_go_on()
    with stop_on_interrupt():
        assert ask_to_go_on()


def test_a_training_that_had_its_time_is_not_launched_again() -> None:
    @task
    def toy() -> None: ...

    state: State[None] = State(type=StateType.FAILED, data=TimeLimitError("the time is over"))
    with stop_on_interrupt():
        assert not is_transient(toy, TaskRun(task_key="toy", dynamic_key="0"), state)


def test_trainings_are_called_by_what_they_know(train_refs: Callable[..., TrainInputs]) -> None:
    inputs = train_refs(("hed",))
    assert Train(TrainConfig(), inputs).title == "Prompt Diffusion"
    baseline = TrainConfig(method="controlnet", vision_tasks=("image_to_hed",))
    assert Train(baseline, inputs).title == "CN(FT) image_to_hed"


def make_step(step: int) -> StepEvent:
    return StepEvent(
        step=step,
        num_steps=5000,
        loss=0.1,
        losses={"depth_to_image": step / 10_000, "hed_to_image": 0.2},
        gradient_norm=0.5,
        learning_rate_factor=1.0,
        num_skipped=0,
        samples_per_second=512.0,
        eta_seconds=60.0,
        device_memory_bytes=61_200_000_000,
        gigaflop_per_sample=None,
        model_flops_per_second=None,
    )


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Give the listeners a plain logger, for there is no task run here."""
    logger = logging.getLogger("tests.progress")
    monkeypatch.setattr(progress, "get_run_logger", lambda: logger)
    return logger


def test_events_are_logged_a_step_only_now_and_then_and_the_bar_follows_the_steps(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bar: list[tuple[float, str]] = []
    monkeypatch.setattr(
        progress, "create_progress_artifact", lambda *point, description: bar.append((*point, description)) or "it"
    )
    monkeypatch.setattr(
        progress, "update_progress_artifact", lambda _, percent, description: bar.append((percent, description))
    )
    with caplog.at_level(logging.INFO):
        report = log_training("joint")
        events: list[Event] = [
            LaunchEvent(command="python -m prompt_diffusion.training.run run.json"),
            make_step(1250),
            make_step(1260),
            ValidationEvent(step=1250, num_steps=5000, loss=0.25, is_best=True),
            make_step(5000),
        ]
        for event in events:
            report(event)
    assert [record.message for record in caplog.records] == [
        f"joint: {describe(events[0])}",
        f"joint [##........] {describe(events[1])}",
        "joint: losses depth→image 0.125, hed→image 0.200",
        f"joint: {describe(events[3])}",
        f"joint [##########] {describe(events[4])}",
        "joint: losses depth→image 0.313, hed→image 0.200",  # the mean of steps 1260 and 5000
    ]
    assert bar == [(25.0, f"joint: {describe(events[1])}"), (100.0, f"joint: {describe(events[4])}")]


def test_a_bar_that_prefect_does_not_take_stops_nothing(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        return httpx.get("http://127.0.0.1:1")

    monkeypatch.setattr(progress, "create_progress_artifact", refuse)
    show_progress()(50.0, "half")
    assert "stays where it is" in caplog.text
