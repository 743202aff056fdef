"""How a long run waits its turn, reports its progress, and is stopped."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from prompt_diffusion.generation import OnStep
from prompt_diffusion.studio.actions import Actions
from prompt_diffusion.studio.layout import ResultView

ONE_AT_A_TIME = "model"
"""All that computes shares one queue with one worker."""


def tell_steps(progress: gr.Progress) -> OnStep:
    """Return what moves the bar over the result, and say that the model comes first."""
    progress(0.0, desc="loading the model")
    return lambda done, total: progress((done, total), desc="denoising", unit="steps")


def stop_run(actions: Actions) -> Callable[[gr.Request], str]:
    """Return what the Stop button does: the visitor's own run ends at its next step, or leaves the queue."""

    def stop(request: gr.Request) -> str:
        actions.stop(str(request.session_hash))
        return "Stopped."

    return stop


def connect_run(
    action: Callable[..., Any],
    start: Sequence[Any],
    stop: gr.Button,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    result: ResultView,
    actions: Actions,
) -> None:
    """Make the events in ``start`` run an action in its turn, and the Stop button end it."""
    running = gr.on(
        list(start),
        action,
        list(inputs),
        list(outputs),
        show_progress_on=[result.image],
        concurrency_id=ONE_AT_A_TIME,
        api_visibility="private",
    )
    stop.click(
        stop_run(actions),
        outputs=result.details,
        cancels=[running],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
