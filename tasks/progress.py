"""Progress of long stages in Prefect: a line in the run's log every few seconds, and a bar on its page."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import fmean
from typing import Any

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from prompt_diffusion.engine.events import Event, StepEvent, describe, describe_losses
from prompt_diffusion.store.records import Progress, ShardProgress
from prompt_diffusion.store.stage import Report

PROGRESS = logging.getLogger("prompt_diffusion.progress")
"""What a command that shows a run listens to: a record has a ``percent``, or says that a ``part`` begins or is over."""
PROGRESS.propagate = False
PROGRESS.addHandler(logging.NullHandler())

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_LOSSES = 60.0
_BAR_WIDTH = 10


def log_progress(what: str, items_per_row: int = 1, unit: str = "rows") -> Report:
    """Return a listener that logs a sharded stage's shards, rate, time left and rejects.

    It writes to the log of the current task run, and keeps that run's progress artifact.
    """
    logger = get_run_logger()
    first: tuple[ShardProgress, float] | None = None
    last_line = time.monotonic()
    show_bar = show_progress()

    def report(progress: Progress) -> None:
        nonlocal first, last_line
        assert isinstance(progress, ShardProgress)
        now = time.monotonic()
        first = first or (progress, now)
        if now - last_line < _SECONDS_BETWEEN_LINES and progress.num_done < progress.num_shards:
            return
        last_line = now
        # Timed from the first report on, since the shards of an earlier run take no time.
        num_timed, seconds = progress.num_done - first[0].num_done, now - first[1]
        pace = ""
        if num_timed:
            rate = (progress.num_rows - first[0].num_rows) * items_per_row / seconds
            left = timedelta(seconds=round((progress.num_shards - progress.num_done) * seconds / num_timed))
            pace = f", {rate:.1f} {unit}/s, {left} left"
        rejects = f", {progress.num_rejects} rejected" if progress.num_rejects else ""
        line = f"{progress.num_done} of {progress.num_shards} shards, {progress.num_rows * items_per_row} {unit}{rejects}{pace}"
        logger.info("%s: %s", what, line)
        percent = 100.0 * progress.num_done / progress.num_shards
        show_bar(percent, f"{what}: {line}")
        PROGRESS.debug("%s", what, extra={"percent": percent})

    return report


def show_progress() -> Callable[[float, str], None]:
    """Return a function that sets percentage and description of a bar on Prefect's page, for the current task run.

    Work that is done at the first call gets no bar. If the server is briefly unavailable, the bar misses an update and the
    work goes on.
    """
    logger = get_run_logger()
    artifact: Any = None  # an id, which Prefect types as one or a coroutine

    def show(percent: float, description: str) -> None:
        nonlocal artifact
        try:
            if artifact is not None:
                update_progress_artifact(artifact, percent, description=description)
            elif percent < 100.0:
                artifact = create_progress_artifact(percent, description=description)
        except httpx.HTTPError as error:
            logger.warning("the bar on Prefect's page stays where it is: %s", error)

    return show


def log_training(name: str) -> Report:
    """Return a listener that logs a training's events and keeps the task run's progress artifact.

    A step is logged with a bar, every few seconds at most; the mean loss of each vision task, every minute at most; every
    other event as it comes.
    """
    logger, show_bar = get_run_logger(), show_progress()
    last_step_line = last_losses_line = 0.0
    losses: dict[str, list[float]] = {}

    def report(event: Progress) -> None:
        nonlocal last_step_line, last_losses_line
        assert isinstance(event, Event)
        if not isinstance(event, StepEvent):
            logger.info("%s: %s", name, describe(event))
            return
        for label, loss in event.losses.items():
            losses.setdefault(label, []).append(loss)
        now, is_last = time.monotonic(), event.step == event.num_steps
        if now - last_step_line >= _SECONDS_BETWEEN_LINES or is_last:
            last_step_line = now
            line = describe(event)
            logger.info("%s %s %s", name, draw_bar(event.step, event.num_steps), line)
            percent = 100.0 * event.step / event.num_steps
            show_bar(percent, f"{name}: {line}")
            PROGRESS.debug("%s", name, extra={"percent": percent})
        if len(losses) > 1 and (now - last_losses_line >= _SECONDS_BETWEEN_LOSSES or is_last):
            last_losses_line = now
            logger.info("%s: %s", name, describe_losses({label: fmean(values) for label, values in losses.items()}))
            losses.clear()

    return report


def draw_bar(done: int, total: int) -> str:
    """Return a bar of text, such as ``[###.......]``."""
    filled = _BAR_WIDTH * done // total
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}]"
