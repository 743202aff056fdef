"""What all commands share: how they fail, where the store is, and how a preset is changed."""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from pydantic import ValidationError

from prompt_diffusion.frozen import say_first_error

USER_ERROR = 2
STOPPED = 130

P = ParamSpec("P")
R = TypeVar("R")

StoreOption = Annotated[
    str | None, typer.Option("--store", help="Folder or s3:// address; default: from the settings.")
]
if TYPE_CHECKING:
    from prompt_diffusion.presets import PresetName
else:
    PresetName = str  # checked with everything else of a run, which names the others

VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print the log, too, which else goes to a file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PresetOption = Annotated[PresetName, typer.Option("--preset", help="smoke, demo or paper.")]
OverridesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field, e.g. train.num_steps=100.")
]


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; a value that is not JSON is text."""
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, such as train.num_steps=100, got {text!r}")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError as error:
            if value.lstrip()[:1] in ("{", "[", '"', "'"):
                raise ValueError(
                    f"--set {key}: {value!r} is not JSON ({error.msg} at letter {error.pos + 1}): write double quotes inside "
                    f"and single quotes around it, --set '{key}={_requote(value)}'"
                ) from None
            overrides[key] = value
        except (
            RecursionError,
            ValueError,
        ) as error:  # nested a thousand levels deep, or a number of thousands of digits
            raise ValueError(f"--set {key}: its value is no JSON that can be read ({error})") from None
    return overrides


def _requote(value: str) -> str:
    """Return what was meant where a value is a Python literal, else the value."""
    try:
        return json.dumps(ast.literal_eval(value))
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return value


@contextmanager
def need_flows() -> Iterator[None]:
    """Turn a failed import of the flows in the block into one sentence: they are in the repository and in no wheel."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("flows", "tasks"):
            raise
        found = PathFinder.find_spec(package)
        other = f" ({found.origin} is another '{package}')" if found is not None and found.origin else ""
        raise ValueError(
            f"this command runs the flows of the repository, which an installed package does not bring{other}: git clone the "
            "repository and run `make demo` there once, then this command as .venv/bin/prompt-diffusion"
        ) from None


def say_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a user's mistake into one sentence on standard error and exit code 2, an interrupt into exit code 130."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ValidationError as error:
            print(f"prompt-diffusion: {say_first_error(error, whole=error.title)}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except (ValueError, OSError) as error:
            said = (
                str(error) if _has_working_directory() else "the working directory was deleted: change into another one"
            )
            print(f"prompt-diffusion: {said}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt as stop:
            print(f"prompt-diffusion: {str(stop) or 'stopped; run the same command to go on'}", file=sys.stderr)
            raise typer.Exit(STOPPED) from None

    return wrapped


def _has_working_directory() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
