"""Children that need not import torch, diffusers and our own modules: forks of one process that has, once a worker."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, TextIO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["diffusers", "transformers", "prompt_diffusion.training.run", "prompt_diffusion.training.train", "tests.warm"]
)


class WarmProcess:
    """A child with its own environment and signals that calls a function; what it prints comes through ``stdout``."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        out: int | None = None,
    ) -> None:
        """``out`` is a file that it prints to instead, and is closed here."""
        read, write = os.pipe() if out is None else (None, out)
        variables = dict(os.environ if environment is None else environment)
        with Connection(write, readable=False) as end:
            # a daemon: it ends with this process, whatever becomes of the test
            self._process = _CONTEXT.Process(
                target=_call, args=(function, arguments, variables, os.getcwd(), end), daemon=True
            )
            self._process.start()
        self.stdout: TextIO | None = None if read is None else os.fdopen(read)

    @property
    def pid(self) -> int:
        """The child's number."""
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def read_lines(self) -> Iterator[str]:
        """Give what it prints, line by line, until it ends."""
        assert self.stdout is not None
        while line := self.stdout.readline():
            yield line

    def wait(self) -> int:
        """Return its exit code, once it has ended, as ``subprocess`` gives it."""
        for _ in self.read_lines() if self.stdout is not None else ():
            pass
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def run_module(module: str, *arguments: str) -> None:
    """Be what ``python -m MODULE ARGUMENTS`` is."""
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # as in a new process, where the main module is nobody's import
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], folder: str, out: Connection
) -> None:
    os.dup2(out.fileno(), 1)
    out.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
