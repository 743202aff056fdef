"""The run's Prefect server for this process's flows, its deployments, and a worker as a child process."""

import subprocess
import sys
from collections.abc import Callable, Iterator
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

from tests.sharing import kill_server, start_server

PrefectCommand = Callable[..., subprocess.CompletedProcess[str]]

_POOL = "prompt-diffusion"


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
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", _POOL, "--type", "process"]
    process = start_server(lambda: command, prefect_environment, log, lambda: True)
    yield log
    kill_server(process)


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
