"""Errors as one sentence on the page, never a traceback."""

import logging
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import ParamSpec, TypeVar

import gradio as gr

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class StoppedError(Exception):
    """The visitor pressed Stop."""


def toast_errors(action: Callable[P, R]) -> Callable[P, R]:
    """Show an action's error as one sentence; errors that are not the user's mistake are logged in full in the terminal."""

    @wraps(action)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return action(*args, **kwargs)
        except gr.Error:
            raise
        except StoppedError:
            raise gr.Error("Stopped.", duration=4, title="", print_exception=False) from None
        except (ValueError, OSError) as error:
            # the page shows messages as HTML, and a file's name may be anything
            raise gr.Error(escape(_capitalise(str(error))), duration=20, title="", print_exception=False) from None
        except Exception as error:
            logger.exception("an action of the studio failed")
            raise gr.Error(
                f"This did not work ({type(error).__name__}): the terminal that runs the studio says more.",
                duration=20,
                title="",
                print_exception=False,
            ) from None

    return wrapped


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
