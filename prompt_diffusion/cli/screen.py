"""What a long command shows: a line for each part of the run, live on a terminal, and everything else in a log file."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

_SECONDS_BETWEEN_LINES = 60.0


class Screen(logging.Handler):
    """Shows which part of a run is being made, and how far its stages are.

    It reads the records of the logger ``tasks.progress.PROGRESS``: ``part`` and ``place`` say that a part begins (or, with
    ``seconds``, that it is over); ``percent`` says how far the stage is that the message names. On a terminal the last line
    is kept up to date; elsewhere there is a line a minute.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to that stream."""
        super().__init__(logging.DEBUG)
        self._console = Console(file=stream, highlight=False)
        self._spinner = Spinner("dots", "starting")
        # Not its own redirection of the output: that would bring to the terminal what belongs into the log.
        self._live = Live(
            self._spinner, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._title = ""
        self._stages: dict[str, _Stage] = {}
        self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._live.start()

    def close(self) -> None:
        """Take the live line away."""
        self._live.stop()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Show what a record says."""
        if hasattr(record, "part"):
            self._show_part(record)
        elif hasattr(record, "percent"):
            self._show_stage(record.getMessage(), record.percent)

    def _show_part(self, record: logging.LogRecord) -> None:
        title = f"[{getattr(record, 'place', '')}] {getattr(record, 'part', '')}"
        seconds = getattr(record, "seconds", None)
        self._stages, self._title = {}, title
        if seconds is not None:
            self._console.print(f"{title} · {say_seconds(seconds)}", markup=False, soft_wrap=True)
        elif self._live.is_started:
            self._spinner.update(text=_fit(title))
        else:
            self._console.print(f"{title} ...", markup=False, soft_wrap=True)
        self._last_line = time.monotonic()

    def _show_stage(self, name: str, percent: float) -> None:
        now = time.monotonic()
        stage = self._stages.setdefault(name, _Stage(percent, now))
        stage.percent = percent
        if percent >= 100.0:
            del self._stages[name]
            return
        line = " · ".join(
            filter(None, [self._title, *(f"{name}: {each.say(now)}" for name, each in self._stages.items())])
        )
        if self._live.is_started:
            self._spinner.update(text=_fit(line))
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._console.print(line, markup=False, soft_wrap=True)
            self._last_line = now


def _fit(text: str) -> Text:
    """Return a text that ends with an ellipsis where the terminal does."""
    return Text(text, no_wrap=True, overflow="ellipsis")


class _Stage:
    """How far a stage is, and since when that is known."""

    def __init__(self, percent: float, now: float) -> None:
        self.first, self.since, self.percent = percent, now, percent

    def say(self, now: float) -> str:
        """Return percentage and, once there is a pace, the time left."""
        done, seconds = self.percent - self.first, now - self.since
        left = f", ~{say_seconds((100.0 - self.percent) * seconds / done)} left" if done > 0 and seconds > 1 else ""
        return f"{self.percent:.0f} %{left}"


def say_seconds(seconds: float) -> str:
    """Return a duration as a person says it: 40 s, 9 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def show_run(log: Path, *, is_verbose: bool) -> Iterator[TextIO]:
    """Show a run's parts for the duration of the block, and put what it and its children print into a file.

    Yields the stream of the terminal, for what cannot wait. With ``is_verbose`` everything is printed, as it comes.
    """
    if is_verbose:
        yield sys.stderr
        return
    from tasks.progress import PROGRESS

    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _redirect_output(log) as terminal:
            screen = Screen(terminal)
            PROGRESS.addHandler(screen)
            level = PROGRESS.level
            PROGRESS.setLevel(logging.DEBUG)
            try:
                yield terminal
            finally:
                PROGRESS.setLevel(level)
                PROGRESS.removeHandler(screen)
                screen.close()
    except BaseException:
        print(f"the log: {log}", file=sys.stderr)
        raise


@contextmanager
def _redirect_output(log: Path) -> Iterator[TextIO]:
    """Append standard output and error of this process, and of those that it starts, to a file; yield the old error stream."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        with os.fdopen(os.dup(saved[1]), "w", buffering=1) as terminal:
            yield terminal
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for place, number in enumerate(saved, start=1):
            os.dup2(number, place)
            os.close(number)
