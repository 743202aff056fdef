"""A store that fails, a full disk, a kill: the same bytes in the end or a clear error, never a seal over a hole."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prompt_diffusion
from prompt_diffusion.store import retries
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import MANIFEST_NAME, Reject, is_sealed, open_manifest
from prompt_diffusion.store.retries import StoreError
from prompt_diffusion.store.sharded import ShardRows, run_sharded_stage
from prompt_diffusion.store.storage import (
    check_writable,
    create_bytes,
    delete_folder,
    list_files,
    open_input,
    read_bytes,
    write_bytes,
    write_from,
)
from prompt_diffusion.store.uris import join_uri
from tests.store.fault_proxy import Fault, FaultProxy, serve_fault_proxy

IDENTITY = StageIdentity(stage="numbers", version=1, config={"rows": 10}, inputs=())
ALWAYS = 10**9
SHARD, MANIFEST = "shard-00001.parquet", MANIFEST_NAME

_PROGRAM = Path(__file__).with_name("interrupted_stage.py")
_REQUEST_TRIES = 3
# aiohttp by itself repeats a request at once whose connection was used before and is found closed.
_MAX_REQUESTS = 2 * max(_REQUEST_TRIES, retries.NUM_TRIES)


class Maker:
    """Make shards of ten rows, one sample rejected in each, and remember which were asked for."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, index: int) -> ShardRows:
        self.made.append(index)
        return pa.table({"x": range(10 * index, 10 * index + 10)}), [Reject(sample_id=f"s{index}", reason="empty")]


def run_stage(root: str) -> list[int]:
    """Run the stage of three shards and return which were made."""
    maker = Maker()
    run_sharded_stage(IDENTITY, root, 3, maker, reject_budget=0.2)
    return maker.made


def read_all(folder: str) -> dict[str, bytes]:
    return {name: read_bytes(join_uri(folder, name)) for name in list_files(folder)}


@dataclass
class FaultyStore:
    """A store behind a proxy, and where its stage's output lies."""

    root: str
    proxy: FaultProxy

    @property
    def folder(self) -> str:
        return IDENTITY.uri(self.root)


@pytest.fixture
def faulty(s3_store: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FaultyStore]:
    """Return a store on the real S3 server behind a proxy, with a client that tries again soon.

    It waits long for an answer, since a busy machine's may take seconds, except where a test has none come.
    """
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    import s3fs
    from botocore.retries.standard import ExponentialBackoff

    monkeypatch.setattr(retries, "_READ_TIMEOUT_SECONDS", 1.0 if params.get("fault") == "hang" else 300.0)
    monkeypatch.setattr(retries, "_REQUEST_TRIES", _REQUEST_TRIES)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    with serve_fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as (proxy, url):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield FaultyStore(s3_store, proxy)
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a run that nothing disturbed."""
    root = str(tmp_path_factory.mktemp("whole"))
    assert run_stage(root) == [0, 1, 2]
    return read_all(IDENTITY.uri(root))


WRITE_FAULTS: list[Fault] = ["500", "503", "reset", "hang", "error in 200", "lost write", "lost answer"]
READ_FAULTS: list[Fault] = ["500", "503", "reset", "hang", "cut"]


@pytest.mark.parametrize("fault", WRITE_FAULTS)
@pytest.mark.parametrize("name", [SHARD, MANIFEST])
def test_write_that_fails_twice_ends_in_the_same_bytes(
    faulty: FaultyStore, whole: dict[str, bytes], fault: Fault, name: str
) -> None:
    faulty.proxy.add_fault(fault, "PUT", name, 2)
    assert run_stage(faulty.root) == [0, 1, 2]
    assert faulty.proxy.num_faults == 2
    assert read_all(faulty.folder) == whole


@pytest.mark.parametrize("fault", READ_FAULTS)
@pytest.mark.parametrize("name", [SHARD, MANIFEST])
def test_read_that_fails_twice_ends_in_the_same_bytes(
    faulty: FaultyStore, whole: dict[str, bytes], fault: Fault, name: str
) -> None:
    for left in ("shard-00000.parquet", SHARD):
        write_bytes(join_uri(faulty.folder, left), whole[left])
    faulty.proxy.add_fault(fault, "GET", name, 2)
    assert run_stage(faulty.root) == [2]
    assert faulty.proxy.num_faults == 2
    assert read_all(faulty.folder) == whole


@pytest.mark.parametrize(("method", "part"), [("HEAD", SHARD), ("HEAD", MANIFEST), ("GET", "list-type=2")])
@pytest.mark.parametrize("fault", ["500", "reset"])
def test_look_that_fails_twice_ends_in_the_same_bytes(
    faulty: FaultyStore, whole: dict[str, bytes], fault: Fault, method: str, part: str
) -> None:
    faulty.proxy.add_fault(fault, method, part, 2)
    assert run_stage(faulty.root) == [0, 1, 2]
    assert faulty.proxy.num_faults == 2
    assert read_all(faulty.folder) == whole


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_write_that_keeps_failing_seals_nothing_and_the_rerun_makes_the_rest(
    faulty: FaultyStore, whole: dict[str, bytes], fault: Fault
) -> None:
    faulty.proxy.add_fault(fault, "PUT", SHARD, ALWAYS)
    with pytest.raises(StoreError, match=f"{faulty.folder}/{SHARD}"):
        run_stage(faulty.root)
    assert 0 < faulty.proxy.num_faults <= _MAX_REQUESTS
    faulty.proxy.heal()
    assert not is_sealed(faulty.folder)
    # Where only the answers were lost, the shard is there.
    assert run_stage(faulty.root) == ([2] if fault == "lost answer" else [1, 2])
    assert read_all(faulty.folder) == whole


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_seal_that_keeps_failing_costs_no_shard(faulty: FaultyStore, whole: dict[str, bytes], fault: Fault) -> None:
    faulty.proxy.add_fault(fault, "PUT", MANIFEST, ALWAYS)
    with pytest.raises(StoreError, match=f"{faulty.folder}/{MANIFEST}"):
        run_stage(faulty.root)
    faulty.proxy.heal()
    assert is_sealed(faulty.folder) == (fault == "lost answer")
    assert run_stage(faulty.root) == []
    assert read_all(faulty.folder) == whole


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_read_that_keeps_failing_seals_nothing_and_the_rerun_makes_the_rest(
    faulty: FaultyStore, whole: dict[str, bytes], fault: Fault
) -> None:
    for left in ("shard-00000.parquet", SHARD):
        write_bytes(join_uri(faulty.folder, left), whole[left])
    faulty.proxy.add_fault(fault, "GET", SHARD, ALWAYS)
    with pytest.raises(StoreError, match=f"cannot read {faulty.folder}/{SHARD}: "):
        run_stage(faulty.root)
    assert 0 < faulty.proxy.num_faults <= _MAX_REQUESTS
    faulty.proxy.heal()
    assert not is_sealed(faulty.folder)
    assert run_stage(faulty.root) == [2]
    assert read_all(faulty.folder) == whole


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_stage_whose_state_cannot_be_seen_is_an_error_and_not_unsealed(faulty: FaultyStore, fault: Fault) -> None:
    run_stage(faulty.root)
    for method, part, verb in (("HEAD", MANIFEST, "look up"), ("GET", "list-type=2", "list")):
        faulty.proxy.heal()
        faulty.proxy.add_fault(fault, method, part, ALWAYS)
        with pytest.raises(StoreError, match=f"cannot {verb} {faulty.folder}"):
            run_stage(faulty.root)


def test_store_that_is_not_there_is_an_error_after_a_few_tries(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=f"cannot read {faulty.folder}/shard-00000.parquet: Could not connect"):
        run_stage(faulty.root)
    with pytest.raises(ValueError, match=f"cannot write to the store {faulty.root}: Could not connect"):
        check_writable(faulty.root)


def test_patience_with_a_silent_store_ends_within_three_minutes() -> None:
    config = retries.build_client_config()
    tries = config["retries"]["total_max_attempts"]
    pauses = sum(2**attempt for attempt in range(tries - 1))
    assert tries >= 3
    assert tries * max(config["read_timeout"], config["connect_timeout"]) + pauses <= 180


def test_create_whose_answer_is_lost_is_won_once(faulty: FaultyStore) -> None:
    uri = join_uri(faulty.root, "prize")
    faulty.proxy.add_fault("lost answer", "PUT", "prize", 1)
    assert create_bytes(uri, b"data") is True
    assert create_bytes(uri, b"data") is False


def test_of_many_creates_of_the_same_bytes_one_wins_though_answers_are_lost(faulty: FaultyStore) -> None:
    uri = join_uri(faulty.root, "prize")
    faulty.proxy.add_fault("lost answer", "PUT", "prize", 4)
    start = threading.Barrier(8)

    def create(_: int) -> bool:
        start.wait()
        return create_bytes(uri, b"the same")

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert faulty.proxy.num_faults == 4
    assert won.count(True) == 1


def test_local_create_whose_answer_is_lost_is_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Path.hardlink_to

    def link_as_nfs_sends_it_again(path: Path, target: Path) -> None:
        link(path, target)
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", link_as_nfs_sends_it_again)
    assert create_bytes(str(tmp_path / "prize"), b"data") is True
    assert create_bytes(str(tmp_path / "prize"), b"data") is False


def test_overwrite_that_is_lost_is_noticed_though_the_size_is_the_same(faulty: FaultyStore) -> None:
    uri = join_uri(faulty.root, "file")
    write_bytes(uri, b"old.")
    faulty.proxy.add_fault("lost write", "PUT", "file", 1)
    write_bytes(uri, b"new1")
    assert read_bytes(uri) == b"new1"
    faulty.proxy.add_fault("lost write", "PUT", "file", ALWAYS)
    with pytest.raises(StoreError, match=f"{uri} holds another content after a write of 4 bytes"):
        write_bytes(uri, b"new2")
    assert read_bytes(uri) == b"new1"


@pytest.mark.parametrize(
    ("fault", "method", "part"),
    [
        ("500", "PUT", "partNumber=2"),
        ("reset", "PUT", "partNumber=1"),
        ("error in 200", "POST", "uploadId="),
        ("lost answer", "POST", "uploadId="),
        ("lost write", "POST", "uploadId="),
        ("500", "POST", "uploads"),
    ],
)
def test_upload_in_parts_ends_whole_or_is_an_error(
    faulty: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, method: str, part: str
) -> None:
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 * 2**20)
    source, uri = tmp_path / "weights", join_uri(faulty.root, "weights")
    source.write_bytes(random.Random(0).randbytes(11 * 2**20))
    faulty.proxy.add_fault(fault, method, part, 1)
    write_from(uri, source)
    assert faulty.proxy.num_faults == 1
    assert read_bytes(uri) == source.read_bytes()
    faulty.proxy.add_fault(fault, method, part, ALWAYS)
    with pytest.raises(StoreError, match=join_uri(faulty.root, "other")):
        write_from(join_uri(faulty.root, "other"), source)


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_file_read_in_place_bears_failures_and_names_itself_when_they_last(
    faulty: FaultyStore, whole: dict[str, bytes], fault: Fault
) -> None:
    uri = join_uri(faulty.root, "t.parquet")
    write_bytes(uri, whole[SHARD])
    faulty.proxy.add_fault(fault, "GET", "t.parquet", 2)
    with open_input(uri) as file:
        assert pq.ParquetFile(file).read()["x"].to_pylist() == list(range(10, 20))
    assert faulty.proxy.num_faults == 2
    faulty.proxy.add_fault(fault, "GET", "t.parquet", ALWAYS)
    with open_input(uri) as file, pytest.raises(StoreError, match=f"cannot read {uri}: "):
        pq.ParquetFile(file).read()


def test_folder_that_is_not_deleted_is_an_error(faulty: FaultyStore) -> None:
    uri = join_uri(faulty.root, "old")
    write_bytes(join_uri(uri, "a"), b"x")
    faulty.proxy.add_fault("wrong delete", "POST", "delete", 1)
    with pytest.raises(StoreError, match=f"cannot delete {uri}: 1 of 1 files are still there"):
        delete_folder(uri)
    delete_folder(uri)
    assert list_files(uri) == []


def run_large_stage(root: str) -> list[int]:
    """Run a stage of four shards of 300 kB and return which were made."""
    made = []

    def make(index: int) -> ShardRows:
        made.append(index)
        return pa.table({"image": [random.Random(index).randbytes(300_000)]}), []

    run_sharded_stage(IDENTITY, root, 4, make)
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the mount point of a disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_full_disk_is_an_error_that_names_the_file_and_the_rerun_makes_the_rest(
    small_disk: Path, tmp_path: Path
) -> None:
    folder = IDENTITY.uri(str(small_disk))
    with pytest.raises(OSError, match=f"No space left on device: '{folder}/shard-00003.parquet'") as caught:
        run_large_stage(str(small_disk))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(folder)) == [f"shard-0000{index}.parquet" for index in range(3)]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert run_large_stage(str(small_disk)) == [3]
    assert run_large_stage(str(tmp_path / "whole")) == [0, 1, 2, 3]
    assert read_all(folder) == read_all(IDENTITY.uri(str(tmp_path / "whole")))


def identify_program(num_shards: int) -> StageIdentity:
    return StageIdentity(stage="interrupted", version=1, config={"num_shards": num_shards}, inputs=())


def start_program(
    root: str, num_shards: int, max_file_bytes: int = resource.RLIM_INFINITY, kill_delay: float | None = None
) -> subprocess.Popen[bytes]:
    """Start a stage of shards of 1.2 MB in a child, which prints the index of each that it makes."""
    return subprocess.Popen(
        [
            sys.executable,
            str(_PROGRAM),
            root,
            str(num_shards),
            "-1",
            *([] if kill_delay is None else [str(kill_delay)]),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(prompt_diffusion.__file__).parents[1])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes)),
    )


def test_file_that_may_not_be_written_whole_leaves_no_part_of_it(tmp_store: str) -> None:
    folder = identify_program(2).uri(tmp_store)
    with start_program(tmp_store, 2, 500_000) as child:
        made, complaints = child.communicate()
    assert (child.returncode, made) == (1, b"0\n")
    reason = f"OSError: [Errno {errno.EFBIG}] File too large: '{folder}/shard-00000.parquet'"
    assert complaints.decode().rstrip().endswith(reason)
    assert os.listdir(folder) == []
    with start_program(tmp_store, 2) as child:
        assert child.communicate() == (b"0\n1\n", b"")
    assert open_manifest(folder).ref.rows == 300


def test_stage_killed_at_random_instants_makes_no_finished_shard_again(store_root: str) -> None:
    whole, resumed = join_uri(store_root, "whole"), join_uri(store_root, "resumed")
    folder = identify_program(8).uri(resumed)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    draw = random.Random(seed)
    for delay in (*(draw.uniform(0, 0.1) for _ in range(5)), None):
        finished = set(list_files(folder))
        with start_program(resumed, 8, kill_delay=delay) as child:
            output, _ = child.communicate()
        assert child.returncode == (0 if delay is None else -signal.SIGKILL)
        made = [int(line) for line in output.split()]
        assert not {f"shard-{index:05d}.parquet" for index in made} & finished
    with start_program(whole, 8) as child:
        child.communicate()
    assert read_all(folder) == read_all(identify_program(8).uri(whole))
    assert is_sealed(folder)
