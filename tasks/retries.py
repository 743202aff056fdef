"""When Prefect retries a task."""

import httpx
from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError
from tasks.plain_errors import USER_MISTAKES
from tasks.train import is_stopping


def is_transient(made: "Task[..., object]", run: TaskRun, state: State[object]) -> bool:
    """Say whether a retry can help.

    It can after a lost connection or a process that was killed, and after nothing else: not with a user's mistake, damaged
    data or a fault of the program, nor after a training's time limit, nor when the run was asked to stop.
    """
    # In a thread that runs an event loop, as a notebook's does, Prefect would give a coroutine otherwise.
    error = state.result(raise_on_failure=False, _sync=True)  # type: ignore[call-overload]
    return _was_lost(error) and not is_stopping()


def _was_lost(error: object) -> bool:
    """Say whether an error is a lost connection or a killed process."""
    if isinstance(error, (*USER_MISTAKES, TimeLimitError)):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "ray.exceptions"}
    is_of_ray = "RayError" in kinds and "RayTaskError" not in kinds  # a worker's end, and not what a task raised in it
    return is_of_ray or isinstance(error, (OSError, httpx.HTTPError, TrainingStoppedError))
