"""Networks are built one at a time in a process.

While diffusers, transformers and accelerate load a model, they replace functions of torch for the whole process (what registers
a parameter, what initialises it) and put back what they found. Two threads that load at once put back each other's
replacements, and from then on every network in the process is built without memory, on the device "meta".
"""

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_lock = RLock()


def builds_networks(build: Callable[P, R]) -> Callable[P, R]:
    """Have a function that builds or loads networks wait until no other thread does; it may call another such function."""

    @wraps(build)
    def build_alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return build(*args, **kwargs)

    return build_alone
