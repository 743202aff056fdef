"""Bars on standard error, drawn in a terminal: of denoising steps (elsewhere a line every quarter) and of phases."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_steps(title: str) -> Iterator[Callable[[int, int], None]]:
    """Give what is told the steps done and their number."""
    if not sys.stderr.isatty():
        yield lambda done, total: _print_quarter(title, done, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


@contextmanager
def show_phases(count: int) -> Iterator[Callable[[str], None]]:
    """Give what is told what begins now, that many times."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("opening", total=count, completed=-1)

        def begin(phase: str) -> None:
            progress.update(bar, advance=1, description=phase)

        yield begin


def _print_quarter(title: str, done: int, total: int) -> None:
    if done * 4 // total > (done - 1) * 4 // total:
        print(f"{title}: {done} of {total} steps", file=sys.stderr, flush=True)
