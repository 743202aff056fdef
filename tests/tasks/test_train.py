"""Trainings hear of an interrupt in whatever thread they run, a stopped one is not launched again, all say where they are."""

import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prefect import task
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.states import State

from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError
from prompt_diffusion.training.stage import Train
from tasks import progress
from tasks.progress import describe_losses, describe_step, log_training, show_progress
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


STEP = {
    "step": 1250,
    "num_steps": 5000,
    "loss": 0.12345,
    "losses": {"depth_to_image": 0.12345, "hed_to_image": 0.2},
    "gradient_norm": 0.5612,
    "num_skipped": 0,
    "samples_per_second": 512.34,
    "eta_seconds": 7384.2,
    "device_memory_bytes": 61_200_000_000,
    "model_flops_per_second": 316.4e12,
}


def test_a_step_s_line_fits_a_terminal_and_leaves_out_what_is_not_known() -> None:
    full = describe_step(STEP)
    assert full == (
        "[##........] step 1250 of 5000, loss 0.1235, gradient 0.561, 512.3 samples/s, 61.2 GB, 316 TFLOP/s, 2:03:04 left"
    )
    assert len(f"Prompt Diffusion {full}") <= 130
    assert "45 GFLOP/s" in describe_step(STEP | {"model_flops_per_second": 45.2e9})
    bare = describe_step(STEP | {"device_memory_bytes": None, "model_flops_per_second": None, "num_skipped": 2})
    assert (
        bare == "[##........] step 1250 of 5000, loss 0.1235, gradient 0.561, 512.3 samples/s, 2 skipped, 2:03:04 left"
    )


def test_the_losses_line_has_the_mean_of_each_vision_task() -> None:
    losses = {"image_to_hed": [0.5], "depth_to_image": [0.1, 0.3]}
    assert describe_losses(losses) == "losses depth→image 0.200, image→hed 0.500"


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Give the listeners a plain logger, for there is no task run here."""
    logger = logging.getLogger("tests.progress")
    monkeypatch.setattr(progress, "get_run_logger", lambda: logger)
    return logger


def test_every_kind_of_event_is_told_and_the_bar_follows_the_steps(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bar: list[tuple[float, str]] = []
    monkeypatch.setattr(
        progress, "create_progress_artifact", lambda percent, description: bar.append((percent, "made"))
    )
    with caplog.at_level(logging.INFO):
        report = log_training("joint")
        report({"command": "python -m prompt_diffusion.training.run run.json"})
        report({"hardware": {"device": "NVIDIA H100", "num_processes": 8}})
        report(STEP)
        report(STEP | {"step": 1260})
        report({"step": 1250, "num_steps": 5000, "validation_loss": 0.25, "is_best": True})
    assert [record.message for record in caplog.records] == [
        "joint, by hand: python -m prompt_diffusion.training.run run.json",
        "joint: device NVIDIA H100, num processes 8",
        f"joint {describe_step(STEP)}",
        "losses depth→image 0.123, hed→image 0.200",
        "joint step 1250: validation loss 0.2500, the best so far",
    ]
    assert bar == [(25.0, "made")]


def test_a_bar_that_prefect_does_not_take_stops_nothing(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        return httpx.get("http://127.0.0.1:1")

    monkeypatch.setattr(progress, "create_progress_artifact", refuse)
    show_progress()(50.0, "half")
    assert "stays where it is" in caplog.text
