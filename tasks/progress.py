"""How a long stage says where it is: one line in the run's log now and then, with the rate and the time left."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from prefect.logging import get_run_logger

Progress = Callable[[int, int, int], None]

_SECONDS_BETWEEN_LINES = 5.0
_BAR_WIDTH = 20


def log_progress(what: str) -> Progress:
    """Return a listener to (shards done, shards, rows so far) that writes to the log of the run it is made in."""
    logger = get_run_logger()
    first: tuple[int, float] | None = None
    said = time.monotonic()

    def report(num_done: int, num_shards: int, num_rows: int) -> None:
        nonlocal first, said
        now = time.monotonic()
        first = first or (num_done, now)
        if now - said < _SECONDS_BETWEEN_LINES and num_done < num_shards:
            return
        said = now
        # Counted from the first report on, for the shards that an earlier run left pass in no time before it.
        num_timed, seconds = num_done - first[0], now - first[1]
        left = f", {(num_shards - num_done) * seconds / num_timed:.0f} s left" if num_timed else ""
        logger.info("%s: %d of %d shards, %d rows%s", what, num_done, num_shards, num_rows, left)

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
