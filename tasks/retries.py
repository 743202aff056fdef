"""When Prefect retries a task."""

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.training.launch import TimeLimitError
from tasks.plain_errors import USER_MISTAKES
from tasks.train import is_stopping


def is_transient(made: "Task[..., object]", run: TaskRun, state: State[object]) -> bool:
    """Say whether a retry can help.

    It cannot help with a user's mistake or damaged data, nor after a training's time limit, nor when the run was asked
    to stop: a training in this process catches the interrupt itself and raises ``Stopped``.
    """
    # In a thread that runs an event loop, as a notebook's does, Prefect would give a coroutine otherwise.
    error = state.result(raise_on_failure=False, _sync=True)  # type: ignore[call-overload]
    return not isinstance(error, (*USER_MISTAKES, TimeLimitError, Stopped)) and not is_stopping()
