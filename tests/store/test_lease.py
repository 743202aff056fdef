"""Of those who want a folder one has it, and the next one when that one gives it back, dies, or falls silent."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prompt_diffusion.store.lease import Lease, LeaseLostError
from prompt_diffusion.store.storage import list_files, read_bytes, write_bytes
from prompt_diffusion.store.uris import join_uri

NEVER = 10_000.0  # seconds of patience that no test waits for


def wait_for(lease: Lease) -> None:
    while not lease.try_acquire():
        time.sleep(0.01)


def read_record(folder: str, number: int = 1) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(read_bytes(join_uri(folder, f"lease-{number:08d}.json")))
    return record


def write_foreign_lease(folder: str, **changes: Any) -> None:
    """Leave what a run on another machine leaves that ends without a word."""
    record = {"owner": "0" * 32, "host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00", "beat": 5}
    record |= {"machine": "another boot", "process_start": "1", "is_released": False} | changes
    write_bytes(join_uri(folder, "lease-00000001.json"), json.dumps(record).encode())


def test_of_many_at_once_one_gets_it_and_the_others_one_after_the_other(store_root: str) -> None:
    folder = join_uri(store_root, "stage")
    inside: list[int] = []

    def work(number: int) -> None:
        lease = Lease(folder, patience_seconds=NEVER)
        wait_for(lease)
        inside.append(number)
        assert inside == [number]
        lease.check()
        inside.remove(number)
        lease.release(is_finished=False)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert len(list_files(folder)) == 1  # the last one's, given back
    assert read_record(folder, 6)["is_released"]


def test_a_finished_stage_keeps_no_lease(store_root: str) -> None:
    folder = join_uri(store_root, "stage")
    write_foreign_lease(folder, is_released=True)
    lease = Lease(folder)
    assert lease.try_acquire()
    assert len(list_files(folder)) == 2
    lease.release(is_finished=True)
    assert list_files(folder) == []


def test_who_works_is_said_to_who_waits(tmp_path: Path) -> None:
    write_foreign_lease(str(tmp_path))
    waiting = Lease(str(tmp_path), patience_seconds=NEVER)
    assert not waiting.try_acquire()
    assert waiting.describe_holder() == "process 7 on elsewhere, since 2026-01-01T00:00:00+00:00"
    waiting.release(is_finished=False)
    assert read_record(str(tmp_path))["owner"] == "0" * 32


def test_a_holder_on_another_machine_that_falls_silent_is_followed(store_root: str) -> None:
    folder = join_uri(store_root, "stage")
    write_foreign_lease(folder)
    assert not Lease(folder, patience_seconds=NEVER).try_acquire()
    lease = Lease(folder, beat_seconds=0.01, patience_seconds=0.1)
    assert not lease.try_acquire()  # nobody's clock is believed: the first look proves nothing
    wait_for(lease)
    assert read_record(folder, 2)["process"] == lease._record["process"]
    lease.release(is_finished=False)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_lease_that_cannot_be_read_ends_as_any_other(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease-00000001.json").write_bytes(content)
    lease = Lease(str(tmp_path), beat_seconds=0.01, patience_seconds=0.05)
    wait_for(lease)
    lease.release(is_finished=True)
    assert list_files(str(tmp_path)) == []


KILLED = """
import os, signal, sys
from prompt_diffusion.store.lease import Lease
assert Lease(sys.argv[1]).try_acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="only Linux says which processes live")
def test_a_holder_that_was_killed_on_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    lease = Lease(str(tmp_path), patience_seconds=NEVER)
    assert lease.try_acquire()
    lease.release(is_finished=False)


def test_a_holder_gives_signs_of_life_so_that_who_waits_goes_on_waiting(tmp_path: Path) -> None:
    held = Lease(str(tmp_path), beat_seconds=0.01)
    assert held.try_acquire()
    while read_record(str(tmp_path))["beat"] < 20:
        time.sleep(0.01)
    held.check()
    held.release(is_finished=False)
    assert read_record(str(tmp_path))["is_released"]


def test_a_holder_that_was_followed_writes_nothing_more(store_root: str) -> None:
    folder = join_uri(store_root, "stage")
    held = Lease(folder, beat_seconds=0.01)
    assert held.try_acquire()
    write_bytes(join_uri(folder, "lease-00000002.json"), b"{}")  # as one does that took it for dead
    held._heart.join()
    with pytest.raises(LeaseLostError, match="was taken over by another run"):
        held.check()
    held.release(is_finished=False)
    assert read_bytes(join_uri(folder, "lease-00000002.json")) == b"{}"


def test_a_holder_that_slept_looks_before_it_writes(tmp_path: Path) -> None:
    held = Lease(str(tmp_path), beat_seconds=NEVER)  # its heart stands still
    assert held.try_acquire()
    held.check()
    (tmp_path / "lease-00000002.json").write_bytes(b"{}")
    held._verified_at -= 3 * NEVER
    with pytest.raises(LeaseLostError):
        held.check()
    held.release(is_finished=False)


def test_a_store_that_is_away_for_a_while_costs_no_lease(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "stage"
    held = Lease(str(folder), beat_seconds=0.01)
    assert held.try_acquire()
    away = tmp_path / "away"
    folder.rename(away)
    folder.write_bytes(b"no folder")
    while "cannot be renewed" not in caplog.text:
        time.sleep(0.01)
    folder.unlink()
    away.rename(folder)
    beat = read_record(str(folder))["beat"]
    while read_record(str(folder))["beat"] <= beat + 1:
        time.sleep(0.01)
    held.check()
    held.release(is_finished=True)
