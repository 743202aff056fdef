"""A real MLflow server, as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.sharing import find_free_ports, is_answering, kill_server, start_server


class Server:
    """A real MLflow server on SQLite, which can be killed and started again on its port."""

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, make_mlflow_database: Callable[[Path], str]) -> None:
        self.folder, self.database = folder, make_mlflow_database(folder)
        (self.port,) = find_free_ports()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        arguments = ["--backend-store-uri", self.database, "--workers", "1", "--host", "127.0.0.1"]
        arguments += ["--artifacts-destination", f"{self.folder}/artifacts", "--port", str(self.port)]
        command = [sys.executable, "-m", "mlflow", "server", *arguments]
        # A session of its own, for the server is a process and its workers.
        self.process = start_server(
            lambda: command, environment, self.folder / "server.log", lambda: is_answering(f"{self.uri}/health")
        )

    def kill(self) -> None:
        """End it as a crash would."""
        kill_server(self.process)
