"""How a long stage says where it is: a line in the run's log now and then, and a bar in Prefect's page."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from prompt_diffusion.store.records import OnProgress, ShardProgress

_SECONDS_BETWEEN_LINES = 5.0
_BAR_WIDTH = 20


def log_progress(what: str, items_per_row: int = 1, unit: str = "rows") -> OnProgress:
    """Return a listener to a sharded stage that tells shards, rate, time left and rejects.

    It writes to the log of the task run that it is made in, and keeps that run's progress artifact.
    """
    logger = get_run_logger()
    first: tuple[ShardProgress, float] | None = None
    said = time.monotonic()
    artifact: Any = None

    def report(told: ShardProgress) -> None:
        nonlocal first, said, artifact
        now = time.monotonic()
        first = first or (told, now)
        if now - said < _SECONDS_BETWEEN_LINES and told.num_done < told.num_shards:
            return
        said = now
        # Counted from the first report on, for the shards that an earlier run left pass in no time before it.
        num_timed, seconds = told.num_done - first[0].num_done, now - first[1]
        pace = ""
        if num_timed:
            rate = (told.num_rows - first[0].num_rows) * items_per_row / seconds
            left = timedelta(seconds=round((told.num_shards - told.num_done) * seconds / num_timed))
            pace = f", {rate:.1f} {unit}/s, {left} left"
        rejects = f", {told.num_rejects} rejected" if told.num_rejects else ""
        line = f"{told.num_done} of {told.num_shards} shards, {told.num_rows * items_per_row} {unit}{rejects}{pace}"
        logger.info("%s: %s", what, line)
        percent = 100.0 * told.num_done / told.num_shards
        if artifact is None and told.num_done < told.num_shards:
            # Only for work that takes long enough to be looked at.
            artifact = create_progress_artifact(percent, description=f"{what}: {line}")
        elif artifact is not None:
            update_progress_artifact(artifact, percent, description=f"{what}: {line}")

    return report


def log_training(name: str) -> Callable[[dict[str, Any]], None]:
    """Return a listener to a training's events that writes a bar, the loss, samples/s and the time left."""
    logger = get_run_logger()
    said = 0.0

    def report(event: dict[str, Any]) -> None:
        nonlocal said
        step, num_steps, now = event["step"], event["num_steps"], time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES and step < num_steps:
            return
        said = now
        filled = _BAR_WIDTH * step // num_steps
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        rate, left = event["samples_per_second"], timedelta(seconds=round(event["eta_seconds"]))
        message = "%s [%s] step %d of %d, loss %.4f, %.1f samples/s, %s left"
        logger.info(message, name, bar, step, num_steps, event["loss"], rate, left)

    return report
