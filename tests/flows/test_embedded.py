"""The server of one process ends with it, however it ends, and does not take the terminal's Ctrl-C for itself."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharing import wait_until

pytestmark = pytest.mark.slow

# A shell's background jobs inherit a SIGINT that is ignored; a terminal's programs do not.
PROGRAM = """
import signal, sys, time
from pathlib import Path
from prefect import flow
from prefect.settings import PREFECT_API_URL
from flows.embedded import embedded_server

signal.signal(signal.SIGINT, signal.default_int_handler)

@flow
def wait():
    print("port", PREFECT_API_URL.value().split(":")[2].removesuffix("/api"), flush=True)
    time.sleep(600)

with embedded_server(Path(sys.argv[1])):
    wait()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the server's database, made once."""
    return tmp_path_factory.mktemp("embedded")


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, True, -signal.SIGINT), (signal.SIGTERM, False, 128 + signal.SIGTERM), (signal.SIGKILL, False, -9)],
    ids=["ctrl-c", "terminated", "killed"],
)
def test_the_server_ends_with_the_process_that_it_is_for(home: Path, number: int, to_group: bool, code: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", PROGRAM, str(home)]
    with (home / f"{number}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert process.stdout is not None
    port = int(next(line for line in process.stdout if line.startswith("port ")).split()[1])
    assert is_listening(port)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait() == code
    process.stdout.close()
    wait_until(lambda: not is_listening(port), "the end of the server")


def is_listening(port: int) -> bool:
    """Say whether anything listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
