"""Flows in one process, with their own Prefect server: what ``make demo`` and the command line run."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

import httpx
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)
from prefect.settings.legacy import Setting

from flows.reproduce import reproduce_run
from flows.run import Overrides, Run, as_subflow, start_run
from flows.stages import find_benchmark, obtain_dataset, obtain_inputs, obtain_pairs
from flows.train import train_joint_model
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.tracking.client import hide_password
from prompt_diffusion.training.stage import Train

logger = logging.getLogger(__name__)

_START_TIMEOUT_SECONDS = 300  # the first start makes the database: 10 seconds, or a minute on a busy machine
_STOP_TIMEOUT_SECONDS = 10
_KNOCK_SECONDS = 10.0
_SETTLE_SECONDS = 0.5  # a Ctrl-C that also ends the server is reported by this process itself
SERVER_LOST = 1


def reproduce_here(run: Run, home: Path, terminal: TextIO | None = None) -> ManifestRef:
    """Return the table: at once if everything is sealed, otherwise made in this process.

    ``home`` is the folder of the embedded server; ``terminal`` gets one sentence if that server dies.
    """
    # Checking the store takes a second; starting a server, only to find nothing to do, takes ten.
    table = find_benchmark(run)
    if table is not None:
        return table
    with embedded_server(home, terminal):
        return as_subflow(reproduce_run, "reproduce")(run)


def train_here(run: Run, home: Path, terminal: TextIO | None = None) -> ManifestRef:
    """Return the model of all vision tasks, made in this process."""
    with embedded_server(home, terminal):
        return as_subflow(train_joint_model, "train")(run)


def find_train_identity(preset: str, overrides: Overrides, store: str | None) -> StageIdentity:
    """Return the identity of that training; UnsealedError names an earlier stage that is not sealed.

    Reads only the store, and writes nothing.
    """
    run = start_run(preset, overrides, store, upstream="require", writes=False)
    return Train(run.config.train, obtain_inputs(run, obtain_dataset(run, obtain_pairs(run)))).identity


@contextmanager
def embedded_server(home: Path, terminal: TextIO | None = None) -> Iterator[None]:
    """Run the flows of the block against their own server, with its database and results below ``home``.

    ``terminal`` (standard error, unless told otherwise) gets one sentence if that server dies, which ends the process.
    If Prefect is pointed at a server (PREFECT_API_URL or a profile), that one is used; a one-sentence ConnectionError if
    it does not answer.
    Prefect's own temporary server is not usable: it also receives the Ctrl-C, and the flow then waits minutes for it.
    """
    if PREFECT_API_URL.value():
        check_server()
        yield
        return
    listener = socket.socket()  # passed to the server, so that nobody can take its port in between
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    settings: dict[Setting, object] = {
        PREFECT_HOME: home.resolve(),
        PREFECT_API_URL: f"http://127.0.0.1:{port}/api",
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_UI_URL: "",  # there is no page to point at
        # Nobody watches this server for dead flows, and each flow waits up to a second for its heart to stop.
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    home.mkdir(parents=True, exist_ok=True)
    with (
        temporary_settings(updates=settings),
        _exit_on_sigterm(),
        _serve(listener, home / "server.log", terminal or sys.stderr),
    ):
        try:
            yield
        finally:
            # Anything left to send when the server ends would be retried for a minute.
            APILogWorker.drain_all()
            EventsWorker.drain_all()


def check_server() -> None:
    """Raise a one-sentence ConnectionError if the server that Prefect is pointed at does not answer, or refuses us.

    Prefect's client itself would try for minutes, and end with a traceback.
    """
    where = f"the Prefect server at {hide_password(PREFECT_API_URL.value() or '')} (PREFECT_API_URL)"
    patience: dict[Setting, object] = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _KNOCK_SECONDS}
    try:
        with temporary_settings(updates=patience), get_client(sync_client=True) as client:
            client.read_flows(limit=1)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        way_out = "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY" if status in (401, 403) else "see its log"
        raise ConnectionError(f"{where} answers with status {status}: {way_out}") from error
    except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"{where} does not answer ({type(error).__name__}): start it, or unset the variable for a server of our own"
        ) from error


@contextmanager
def _serve(listener: socket.socket, log: Path, terminal: TextIO) -> Iterator[None]:
    """Run the server's process for the duration of the block."""
    environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
    port, number = listener.getsockname()[1], listener.fileno()
    # -P: nothing is imported from the current folder, such as a user's own flows.py or random.py
    command = [sys.executable, "-P", "-m", "flows.server", str(number)]
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
    is_over = threading.Event()
    try:
        logger.info("starting Prefect's server")
        _wait_until_healthy(server, port, log)
        threading.Thread(target=_follow, args=(server, is_over, log, terminal), daemon=True).start()
        yield
    finally:
        is_over.set()
        server.terminate()
        try:
            server.wait(_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _follow(server: subprocess.Popen[bytes], is_over: threading.Event, log: Path, terminal: TextIO) -> None:
    """End this process at once, with one sentence, if its server ends before it does.

    Prefect would retry the dead server for minutes. Nothing is lost by exiting: the store keeps what is finished, trainings
    save and stop when their parent is gone, and what was not sent to MLflow waits in its outbox.
    """
    server.wait()
    if is_over.wait(_SETTLE_SECONDS):
        return
    terminal.write(
        f"prompt-diffusion: Prefect's own server ended ({_describe_exit(server)}), see {log.resolve()}: "
        "run the same command to go on\n"
    )
    terminal.flush()
    os._exit(SERVER_LOST)


def _describe_exit(server: subprocess.Popen[bytes]) -> str:
    code = server.returncode
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    started = time.monotonic()
    give_up = started + _START_TIMEOUT_SECONDS
    while server.poll() is None and time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    seconds = round(time.monotonic() - started)
    if server.poll() is not None:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise ConnectionError(
            f"Prefect's server ended after {seconds} seconds ({_describe_exit(server)}): {last}; see {log.resolve()}"
        )
    raise ConnectionError(f"Prefect's server did not start within {seconds} seconds: see {log.resolve()}")


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
