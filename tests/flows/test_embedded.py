"""The server of one process ends with it, however it ends, and does not take the terminal's Ctrl-C for itself."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import embedded
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


LOST_SERVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from prefect import flow
from flows import embedded

started = []
popen = subprocess.Popen
embedded.subprocess.Popen = lambda *a, **k: started.append(popen(*a, **k)) or started[-1]

@flow
def wait():
    os.kill(started[0].pid, signal.SIGKILL)
    time.sleep(600)

with embedded.embedded_server(Path(sys.argv[1])):
    wait()
"""


def test_a_server_that_is_killed_ends_the_command_with_one_sentence(home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", LOST_SERVER, str(home)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == embedded.SERVER_LOST
    said = [line for line in ended.stderr.splitlines() if line.startswith("prompt-diffusion:")]
    assert len(said) == 1
    assert "Prefect's own server ended (SIGKILL)" in said[0]
    assert "Traceback" not in ended.stderr


def test_a_server_that_ends_at_once_is_told_with_the_seconds_that_passed_and_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("first\nModuleNotFoundError: no module\n")
    server = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    server.wait()
    with pytest.raises(
        ConnectionError, match=r"ended after 0 seconds \(exit code 3\): ModuleNotFoundError: no module; see"
    ):
        embedded._wait_until_healthy(server, 1, log)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that wants to know who asks."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_that_is_away_or_refuses_us_is_one_sentence(tmp_path: Path) -> None:
    refusing = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    cases = {
        "http://me:secret@127.0.0.1:1/api": "does not answer",
        f"http://me:secret@127.0.0.1:{refusing.server_port}/api": "answers with status 401: set PREFECT_API_AUTH_STRING",
    }
    for url, says in cases.items():
        settings = temporary_settings(updates={PREFECT_API_URL: url})
        with (
            settings,
            pytest.raises(ConnectionError, match=says) as caught,
            embedded.embedded_server(tmp_path / "home"),
        ):
            pytest.fail("it went on")
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
    refusing.shutdown()
    assert not (tmp_path / "home").exists()


def test_a_users_own_modules_of_the_current_folder_are_not_taken_for_ours(tmp_path: Path) -> None:
    """As the console script runs it: ``-P`` keeps the folder off this process's own path, too."""
    for name in ("flows", "tasks", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the module of the current folder was imported')\n")
    program = (
        "import sys\nfrom pathlib import Path\nfrom flows.embedded import embedded_server\n"
        "with embedded_server(Path(sys.argv[1])):\n    print('healthy')\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTHON"))}
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "prefect")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "healthy\n", result.stderr


def is_listening(port: int) -> bool:
    """Say whether anything listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
