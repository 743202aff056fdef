"""When Prefect tries a task again."""

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun

from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.training.launch import TimeLimitError
from tasks.plain_errors import USER_MISTAKES
from tasks.train import is_stopping


def is_transient(made: "Task[..., object]", run: TaskRun, state: State[object]) -> bool:
    """Say whether a retry can help.

    It cannot with a user's mistake or damaged data, which stay so; nor where a training had its time, or the run was asked
    to stop: a training in this process catches the interrupt itself and says so by ``Stopped``.
    """
    error = state.result(raise_on_failure=False)
    return not isinstance(error, (*USER_MISTAKES, TimeLimitError, Stopped)) and not is_stopping()
