"""What all commands share: how they fail, and where the store is."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec, TypeVar

import typer

USER_ERROR = 2
STOPPED = 130

P = ParamSpec("P")
R = TypeVar("R")

StoreOption = Annotated[str | None, typer.Option("--store", help="Folder or s3:// address; default: the settings'.")]


def say_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a user's mistake into one sentence on standard error and exit code 2, an interrupt into exit code 130."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            print(f"prompt-diffusion: {error}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            print("prompt-diffusion: stopped; run the same command to go on", file=sys.stderr)
            raise typer.Exit(STOPPED) from None

    return wrapped
