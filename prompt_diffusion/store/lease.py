"""A lease on a stage's folder: of all runs that make the same stage, on one machine or on many, one works at a time.

The newest of the files ``lease-00000001.json``, ``lease-00000002.json``, ... in the folder says who holds it. The holder's
thread rewrites that file every few seconds. A waiting run watches it: where it has not changed for the time of the watcher's
patience, by the watcher's own clock, the holder is presumed dead, and the watcher creates the file with the next number, in
which exactly one of all that try succeeds. So no two machines' clocks are ever compared. A holder that was merely delayed
finds the next number at its next look, before it writes anything; the new holder waits long enough for that look.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prompt_diffusion.store.retries import describe_error
from prompt_diffusion.store.storage import create_bytes, delete_file, exists, list_files, read_bytes, write_bytes
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)

BEAT_SECONDS: Final = 10.0
"""Time between two signs of life."""
PATIENCE_SECONDS: Final = 60.0
"""Time without one after which a holder whose process cannot be checked is presumed dead."""
_NAME = re.compile(r"lease-(\d{8})\.json")


class LeaseLostError(RuntimeError):
    """Another run has taken the folder over, because this one gave no sign of life for too long."""


class Lease:
    """One run's claim to a folder (a URI); ``try_acquire`` until it is held, ``check`` before each write, ``release``."""

    def __init__(
        self, folder: str, beat_seconds: float = BEAT_SECONDS, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self.folder, self.beat_seconds, self.patience_seconds = folder, beat_seconds, patience_seconds
        self._record: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _identify_machine(),
            "process_start": _find_process_start(os.getpid()),
            "beat": 0,
            "is_released": False,
        }
        self._number = 0  # of our file
        self._free_at = 0.0
        self._seen: tuple[int, bytes] | None = None
        self._seen_at = 0.0
        self._verified_at = 0.0
        self._is_lost = False
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._heart = threading.Thread(target=self._beat_until_closed, name="lease", daemon=True)

    def try_acquire(self) -> bool:
        """Say whether the folder is ours, after one look at it; called repeatedly, it takes the folder once that is free."""
        if not self._number:
            self._look()
        return bool(self._number) and _now() >= self._free_at

    def describe_holder(self) -> str:
        """Return who was found to hold the folder at the last look, for people."""
        record = _parse(self._seen[1]) if self._seen else {}
        process, host, since = (record.get(key, "?") for key in ("process", "host", "since"))
        return f"process {process} on {host}, since {since}"

    def check(self) -> None:
        """Raise LeaseLostError where another run has taken over; OSError where that cannot be found out."""
        if not self._is_lost and _now() - self._verified_at > 2 * self.beat_seconds:
            self._beat()
        if self._is_lost:
            raise LeaseLostError(
                f"{self.folder} was taken over by another run, because this one gave no sign of life for "
                f"{self.patience_seconds:g} seconds: it writes nothing more there"
            )

    def release(self, *, is_finished: bool) -> None:
        """Release the folder; where the stage is finished, so that no run needs the folder any more, no file is left."""
        if not self._number:
            return
        self._closing.set()
        self._heart.join(self.beat_seconds)  # an unreachable store would block it for minutes
        try:
            if not self._is_lost and not is_finished:
                self._record["is_released"] = True
                write_bytes(self._uri(self._number), json.dumps(self._record).encode())
            for number in self._list_numbers():
                if number < self._number or (number == self._number and is_finished):
                    delete_file(self._uri(number))
        except OSError as error:
            logger.warning("%s is not released, others wait until the lease ends: %s", self.folder, error)

    def _look(self) -> None:
        """See who holds the folder, and take it where nobody does any more."""
        newest = max(self._list_numbers(), default=0)
        if newest == 0:
            self._take(1, settling_seconds=0.0)
            newest = 0 if self._number else max(self._list_numbers(), default=0)
        if newest == 0:
            return
        try:
            seen = (newest, read_bytes(self._uri(newest)))
        except FileNotFoundError:
            return  # released since it was listed: the next look finds out
        if seen != self._seen:
            self._seen, self._seen_at = seen, _now()
        record = _parse(seen[1])
        if record.get("is_released") is True or _is_dead(record):
            self._take(newest + 1, settling_seconds=0.0)
        elif _now() - self._seen_at >= self.patience_seconds:
            logger.warning("%s: %s gives no sign of life: taking over", self.folder, self.describe_holder())
            self._take(newest + 1, settling_seconds=2 * self.beat_seconds)

    def _take(self, number: int, settling_seconds: float) -> None:
        verified_at = _now()
        if create_bytes(self._uri(number), json.dumps(self._record).encode()):
            self._number, self._verified_at, self._free_at = number, verified_at, verified_at + settling_seconds
            self._heart.start()

    def _beat_until_closed(self) -> None:
        is_well = True
        while not self._closing.wait(self.beat_seconds) and not self._is_lost:
            try:
                self._beat()
            except OSError as error:  # the store is unreachable: the lease is ours as long as nobody else takes it
                if is_well:
                    logger.warning("the lease of %s cannot be renewed: %s", self.folder, describe_error(error))
                is_well = False
            else:
                is_well = True

    def _beat(self) -> None:
        """Give a sign of life, and see before and after it whether another run has taken over."""
        with self._lock:
            began = _now()
            self._is_lost = self._is_lost or self._is_superseded() or not self._is_ours()
            if self._is_lost:
                return
            self._record["beat"] += 1
            write_bytes(self._uri(self._number), json.dumps(self._record).encode())
            self._is_lost = self._is_superseded()
            self._verified_at = began

    def _is_superseded(self) -> bool:
        return exists(self._uri(self._number + 1))

    def _is_ours(self) -> bool:
        """Say whether our file is still ours; where a person deleted the whole folder, it is written again."""
        try:
            return bool(_parse(read_bytes(self._uri(self._number))).get("owner") == self._record["owner"])
        except (FileNotFoundError, NotADirectoryError):
            return not list_files(self.folder)

    def _list_numbers(self) -> list[int]:
        return [int(found[1]) for found in map(_NAME.fullmatch, list_files(self.folder)) if found]

    def _uri(self, number: int) -> str:
        return join_uri(self.folder, f"lease-{number:08d}.json")


def _parse(content: bytes) -> dict[str, Any]:
    """Return the record of a lease; empty for one that cannot be read: then only its signs of life count."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_dead(record: dict[str, Any]) -> bool:
    """Say whether a holder is known to be gone: a process that this machine can look for, and does not find."""
    machine, process = record.get("machine"), record.get("process")
    if machine is None or machine != _identify_machine() or not isinstance(process, int):
        return False
    return _find_process_start(process) != record.get("process_start")


def _identify_machine() -> str | None:
    """Return what processes that can see each other share: the machine's boot and its PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _find_process_start(process: int) -> str | None:
    """Return when a process of this machine began, which tells it from a later one with the same PID; None if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start


def _now() -> float:
    """Return the seconds of a clock that is never set and keeps running while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
