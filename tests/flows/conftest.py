"""A real Prefect server for the session, and a worker, as child processes with a folder of their own."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)

PrefectCommand = Callable[..., subprocess.CompletedProcess[str]]

_START_TIMEOUT_SECONDS = 240  # ten on an idle machine; the first start makes the database
_STOP_TIMEOUT_SECONDS = 30
_POOL = "prompt-diffusion"


@pytest.fixture(scope="session")
def prefect_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a Prefect server on a free port; return the environment in which commands and children find it."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        "PROMPT_DIFFUSION_STORE": str(home / "store"),
        "PROMPT_DIFFUSION_CACHE_DIR": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with _serve(arguments, environment, home / "server.log") as process:
        _wait_until_healthy(process, environment["PREFECT_API_URL"], home / "server.log")
        yield environment


@pytest.fixture(scope="session")
def prefect_command(prefect_environment: dict[str, str]) -> PrefectCommand:
    """Return what runs one of Prefect's commands in the checkout."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", *arguments]
        return subprocess.run(command, env=prefect_environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def deployments(prefect_command: PrefectCommand) -> None:
    """Register every deployment of this checkout."""
    for arguments in (["work-pool", "create", _POOL, "--type", "process"], ["--no-prompt", "deploy", "--all"]):
        result = prefect_command(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="session")
def worker_log(deployments: None, prefect_environment: dict[str, str]) -> Iterator[Path]:
    """Run a process worker; return the file that it logs to."""
    log = Path(prefect_environment["PREFECT_HOME"]) / "worker.log"
    with _serve(["worker", "start", "--pool", _POOL, "--type", "process"], prefect_environment, log):
        yield log


@pytest.fixture
def in_process(prefect_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process's flows use the server and its MLflow database (making one takes seconds)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", prefect_environment["MLFLOW_TRACKING_URI"])
    monkeypatch.setenv("PROMPT_DIFFUSION_CACHE_DIR", str(tmp_path / "cache"))
    settings = {
        PREFECT_API_URL: prefect_environment["PREFECT_API_URL"],
        PREFECT_HOME: Path(prefect_environment["PREFECT_HOME"]),
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    with temporary_settings(updates=settings):
        yield
        # What is left to send when the server ends would be tried again and again for a minute at exit.
        APILogWorker.drain_all()
        EventsWorker.drain_all()


@contextmanager
def _serve(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of Prefect's services for the time of the block."""
    with log.open("wb") as sink:
        command = [sys.executable, "-m", "prefect", *arguments]
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up = time.monotonic() + _START_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise RuntimeError(f"the Prefect server did not start: {log.read_text()[-2000:]}")
