"""``guard.py PID COMMAND...``: run the command for as long as that process lives; a SIGTERM is passed on."""

import os
import signal
import subprocess
import sys
import time


def main(pid: int, command: list[str]) -> int:
    """Return the exit code of the command, which ends, with all its children, when the process does."""
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while process.poll() is None and is_alive(pid):
        time.sleep(0.2)
    if process.poll() is None:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    return process.returncode


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
