"""Trainings that other threads wait for hear of an interrupt, and a stopped training is not launched again."""

import pytest
from prefect import task
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.states import State

from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.launch import TrainingStoppedError
from tasks.train import can_go_on, name_training, stop_on_interrupt


def ask_to_go_on() -> bool:
    @task
    def toy() -> None: ...

    state: State[None] = State(type=StateType.FAILED, data=TrainingStoppedError("killed"))
    return can_go_on(toy, TaskRun(task_key="toy", dynamic_key="0"), state)


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


def test_trainings_are_called_by_what_they_know() -> None:
    assert name_training(TrainConfig()) == "Prompt Diffusion"
    baseline = TrainConfig(method="controlnet", vision_tasks=("image_to_hed",))
    assert name_training(baseline) == "CN(FT) image_to_hed"
