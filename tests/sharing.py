"""What every process of one test run shares: folders and servers, made by the first that asks."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

TINY_BASE: dict[str, Any] = {
    "image_size": 32,
    "vae_channels": (8, 8, 8),
    "unet_channels": (16, 16),
    "attention_heads": 2,
    "norm_groups": 4,
    "text_channels": 16,
    "text_layers": 1,
    "vocabulary_size": 80,
}
"""The architecture of a base two orders smaller than the demo's."""
RUN_VARIABLE = "PROMPT_DIFFUSION_TEST_RUN_PID"
PATIENCE_SECONDS = 800.0
"""No property: only how long a test waits for an event before it says which one never came; pytest's own limit is longer."""
_GUARD = Path(__file__).with_name("guard.py")
_PORTS = range(20_000, 32_000)  # below those that Linux gives to whoever asks for any, so nobody gets one by chance


def wait_until(is_so: Callable[[], Any], what: str, describe: Callable[[], str] = str) -> Any:
    """Return what the condition gives as soon as it holds; AssertionError, with a description, where it never does."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not (found := is_so()):
        assert time.monotonic() < give_up, f"{what} never came: {describe()[-3000:]}"
        time.sleep(0.05)
    return found


def find_free_ports(count: int = 1) -> list[int]:
    """Return that many ports of this machine on which nobody listens, all different."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def is_answering(url: str) -> bool:
    """Say whether a server answers there with success."""
    try:
        with urllib.request.urlopen(url, timeout=60):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def start_server(
    build_command: Callable[[], Sequence[str]], environment: dict[str, str], log: Path, is_ready: Callable[[], bool]
) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own and return it once it is ready; one that ends is started again, twice.

    The command is built anew for each start: another program may have taken the port that it names.
    """
    for _ in range(3):
        process = _start(build_command(), environment, log)
        if _has_started(process, is_ready, log):
            return process
    raise RuntimeError(f"{process.args} ended with {process.returncode}: {log.read_text()[-3000:]}")


def _start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


def _has_started(process: subprocess.Popen[bytes], is_ready: Callable[[], bool], log: Path) -> bool:
    """Wait until the server is ready or has ended, and say which."""
    wait_until(lambda: process.poll() is not None or is_ready(), f"the start of {process.args}", log.read_text)
    return process.poll() is None


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, wait until it has, and end what it left in its session."""
    process.terminate()
    process.wait(PATIENCE_SECONDS)
    kill_server(process)


def kill_server(process: subprocess.Popen[bytes]) -> None:
    """End a server and all its children as a crash would."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def for_the_run(command: Sequence[str]) -> list[str]:
    """Return the command line of a server that ends with the test run, however the run ends."""
    return [sys.executable, str(_GUARD), os.environ[RUN_VARIABLE], *command]


@contextmanager
def lock_in_run(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Hold the run's lock of that name, and give the path of that name in the folder that the run shares."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder / f"shared-{name}"


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """Return a folder of that name and, from JSON, what ``make(folder)`` returned, which is called once in a run."""
    with lock_in_run(factory, name) as folder:
        note = folder.with_suffix(".json")
        if not note.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a maker that failed
            folder.mkdir()
            note.write_text(json.dumps(make(folder)))
        return folder, json.loads(note.read_text())
