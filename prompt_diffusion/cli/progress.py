"""Progress bars on standard error: of denoising steps (off a terminal, a line every quarter) and of phases."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_diffusion.generation import OnStep


@contextmanager
def show_steps(title: str) -> "Iterator[OnStep]":
    """Yield a function to call with the number of steps done and their total."""
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
    """Yield a function to call with the name of each phase as it begins, ``count`` times in all."""
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
