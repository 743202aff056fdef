"""Flows in one process, with a Prefect server of its own: what `make demo` and the command line run."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)

from flows.reproduce import reproduce_run
from flows.run import Overrides, Preset, as_subflow, start_run
from flows.stages import find_benchmark, obtain_dataset, obtain_inputs, obtain_pairs
from flows.train import train_joint_model
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.training.stage import Train

logger = logging.getLogger(__name__)

_START_TIMEOUT_SECONDS = 300  # the first start makes the database: 10 seconds, or a minute on a busy machine
_STOP_TIMEOUT_SECONDS = 10


def reproduce_here(preset: Preset, overrides: Overrides, store: str | None, home: Path) -> ManifestRef:
    """Return the table: made in this process where anything is missing, at once where everything is sealed.

    `home` is the folder of the embedded server. ValueError, one sentence, for what a user got wrong, before it starts.
    """
    run = start_run(preset, overrides, store)
    # Asking the store costs a second; the server, which would only hear that there is nothing to do, ten.
    table = find_benchmark(run)
    if table is not None:
        return table
    with embedded_server(home):
        return as_subflow(reproduce_run, "reproduce")(run)


def train_here(preset: Preset, overrides: Overrides, store: str | None, home: Path) -> ManifestRef:
    """Return the model of all vision tasks, made in this process; ValueError as `reproduce_here` raises it."""
    run = start_run(preset, overrides, store)
    with embedded_server(home):
        return as_subflow(train_joint_model, "train")(run)


def find_train_identity(preset: Preset, overrides: Overrides, store: str | None) -> StageIdentity:
    """Return what that training would be known by; UnsealedError names a stage before it that is not made.

    Asks the store alone, and writes nothing.
    """
    run = start_run(preset, overrides, store, upstream="require", writes=False)
    return Train(run.config.train, obtain_inputs(run, obtain_dataset(run, obtain_pairs(run)))).identity


@contextmanager
def embedded_server(home: Path) -> Iterator[None]:
    """Run the flows of the block against a server of their own, with its database and results below `home`.

    Where Prefect is pointed at a server (PREFECT_API_URL or a profile), that one is used and nothing is changed.
    Prefect's own temporary server does not do: it takes a Ctrl-C for itself, and the flow then waits minutes for it.
    """
    if PREFECT_API_URL.value():
        yield
        return
    listener = socket.socket()  # handed to the server, so that nobody can take its port in between
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    settings: dict[Any, Any] = {
        PREFECT_HOME: home.resolve(),
        PREFECT_API_URL: f"http://127.0.0.1:{port}/api",
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_UI_URL: "",  # there is no page to point at
        # Nobody watches this server for dead flows, and each flow waits up to a second for its heart to stop.
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    home.mkdir(parents=True, exist_ok=True)
    with temporary_settings(updates=settings), _exit_on_sigterm(), _serve(listener, home / "server.log"):
        try:
            yield
        finally:
            # What is left to send when the server ends would be tried again and again for a minute.
            APILogWorker.drain_all()
            EventsWorker.drain_all()


@contextmanager
def _serve(listener: socket.socket, log: Path) -> Iterator[None]:
    """Run the server's process for the time of the block."""
    environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
    port, number = listener.getsockname()[1], listener.fileno()
    command = [sys.executable, "-m", "flows.server", str(number)]
    with listener, log.open("wb") as sink:
        # A session of its own: the terminal's Ctrl-C is for the flows.
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            env=environment,
            start_new_session=True,
            pass_fds=(number,),
        )
    try:
        logger.info("starting Prefect's server")
        _wait_until_healthy(server, port, log)
        yield
    finally:
        server.terminate()
        try:
            server.wait(_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up = time.monotonic() + _START_TIMEOUT_SECONDS
    while server.poll() is None and time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"Prefect's server did not start within {_START_TIMEOUT_SECONDS} seconds: see {log}")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into a regular exit: left to itself, it would end this process without ending what it started."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
