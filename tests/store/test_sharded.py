"""The engine of the sharded stages: nothing twice, resume after a kill, the same bytes, rejects counted and bounded."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prompt_diffusion
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import MANIFEST_NAME, Reject, is_sealed, open_manifest
from prompt_diffusion.store.records import ShardProgress
from prompt_diffusion.store.sharded import ShardRows, encode_shard, make_shards, run_sharded_stage
from prompt_diffusion.store.storage import list_files, read_bytes, write_bytes
from prompt_diffusion.store.uris import join_uri, local_path
from tests.sharing import wait_until

IDENTITY = StageIdentity(stage="numbers", version=1, config={"rows": 10}, inputs=())
_PROGRAM = Path(__file__).with_name("interrupted_stage.py")


class Maker:
    """Make shards of ten rows, one sample rejected in each, and remember which were asked for."""

    def __init__(self, rejects_per_shard: int = 1) -> None:
        self.made: list[int] = []
        self._rejects_per_shard = rejects_per_shard

    def __call__(self, index: int) -> ShardRows:
        self.made.append(index)
        rejects = [
            Reject(sample_id=f"{index}-{number}", reason="its image is empty")
            for number in range(self._rejects_per_shard)
        ]
        return pa.table({"x": range(10 * index, 10 * index + 10)}), rejects


def read_all(folder: str) -> dict[str, bytes]:
    return {name: read_bytes(join_uri(folder, name)) for name in list_files(folder)}


def read_write_marks(folder: str) -> dict[str, Any]:
    """Return what any write of a file changes: time and inode in a folder, time and ETag on S3."""
    path = local_path(folder)
    if path is not None:
        return {name: ((path / name).stat().st_mtime_ns, (path / name).stat().st_ino) for name in list_files(folder)}
    s3fs = pytest.importorskip("s3fs")
    entries = s3fs.S3FileSystem(use_listings_cache=False).find(folder, detail=True)
    return {name: (entry["LastModified"], entry["ETag"]) for name, entry in entries.items()}


def test_rows_come_back_in_order_and_counts_add_up(store_root: str) -> None:
    ref = run_sharded_stage(IDENTITY, store_root, 3, Maker(), reject_budget=0.1)
    manifest = open_manifest(ref.uri)
    assert manifest.read_table()["x"].to_pylist() == list(range(30))
    assert [shard.path for shard in manifest.shards] == [f"shard-0000{index}.parquet" for index in range(3)]
    assert ref.rows == manifest.counts["rows"] == sum(shard.rows for shard in manifest.shards) == 30
    assert manifest.counts["rejects"] == len(manifest.rejects) == 3
    assert manifest.identity == IDENTITY


def test_rerun_of_a_sealed_stage_writes_nothing(store_root: str) -> None:
    first = run_sharded_stage(IDENTITY, store_root, 3, Maker(), reject_budget=0.1)
    before = read_write_marks(first.uri)
    second = int(time.time())
    wait_until(lambda: time.time() >= second + 1, "the next second")  # S3 tells the time in whole ones
    maker = Maker()
    assert run_sharded_stage(IDENTITY, store_root, 3, maker, reject_budget=0.1) == first
    assert maker.made == []
    assert len(before) == 4
    assert read_write_marks(first.uri) == before


def test_progress_is_told_after_each_shard(tmp_store: str) -> None:
    heard: list[ShardProgress] = []
    run_sharded_stage(IDENTITY, tmp_store, 3, Maker(0), on_progress=heard.append)
    assert heard == [ShardProgress(1, 3, 10, 0), ShardProgress(2, 3, 20, 0), ShardProgress(3, 3, 30, 0)]


def test_shards_made_elsewhere_are_sealed_unread_into_the_same_bytes(store_root: str, tmp_store: str) -> None:
    whole = run_sharded_stage(IDENTITY, join_uri(tmp_store, "whole"), 5, Maker(), reject_budget=0.1)
    parts = [make_shards(IDENTITY, store_root, 5, Maker(), indices) for indices in ([3, 4], [0, 1])]
    assert not is_sealed(IDENTITY.uri(store_root))
    maker = Maker()
    ref = run_sharded_stage(
        IDENTITY, store_root, 5, maker, made=[shard for part in parts for shard in part], reject_budget=0.1
    )
    assert maker.made == [2]
    assert open_manifest(ref.uri).files == open_manifest(whole.uri).files
    assert open_manifest(ref.uri).rejects == open_manifest(whole.uri).rejects


def test_shards_made_at_once_are_the_same_and_in_order(tmp_store: str) -> None:
    heard: list[ShardProgress] = []
    one = run_sharded_stage(IDENTITY, join_uri(tmp_store, "one"), 6, Maker(), reject_budget=0.1)
    three = run_sharded_stage(
        IDENTITY, join_uri(tmp_store, "three"), 6, Maker(), num_at_once=3, reject_budget=0.1, on_progress=heard.append
    )
    assert open_manifest(three.uri).files == open_manifest(one.uri).files
    assert [told.num_done for told in heard] == [1, 2, 3, 4, 5, 6]


def run_program(root: str, kill_after: int, *kill_delay: float) -> tuple[int, list[int]]:
    """Run the stage in a child; return its exit status and the shards that it made."""
    checkout = str(Path(prompt_diffusion.__file__).parents[1])
    command = [sys.executable, str(_PROGRAM), root, "4", str(kill_after), *map(str, kill_delay)]
    environment = {**os.environ, "PYTHONPATH": checkout}
    child = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    return child.returncode, [int(line) for line in child.stdout.split()]


def test_killed_stage_makes_only_the_rest_and_ends_with_the_same_bytes(store_root: str) -> None:
    identity = StageIdentity(stage="interrupted", version=1, config={"num_shards": 4}, inputs=())
    whole, resumed = join_uri(store_root, "whole"), join_uri(store_root, "resumed")
    assert run_program(whole, -1) == (0, [0, 1, 2, 3])
    assert run_program(resumed, 2) == (-signal.SIGKILL, [0, 1])
    assert not is_sealed(identity.uri(resumed))
    marks = read_write_marks(identity.uri(resumed))
    assert run_program(resumed, -1) == (0, [2, 3])
    assert read_all(identity.uri(resumed)) == read_all(identity.uri(whole))
    # The rejects of the shards from before the kill are kept.
    rejects = open_manifest(identity.uri(resumed)).rejects
    assert [reject.sample_id for reject in rejects] == ["sample-1", "sample-3"]
    after = read_write_marks(identity.uri(resumed))
    assert {name: after[name] for name in marks} == marks


def test_stage_killed_at_any_instant_ends_with_the_same_bytes(tmp_store: str) -> None:
    identity = StageIdentity(stage="interrupted", version=1, config={"num_shards": 4}, inputs=())
    whole, resumed = join_uri(tmp_store, "whole"), join_uri(tmp_store, "resumed")
    assert run_program(whole, -1)[0] == 0
    for delay_seconds in (0.0, 0.004, 0.012):
        assert run_program(resumed, -1, delay_seconds)[0] == -signal.SIGKILL
    assert run_program(resumed, -1)[0] == 0
    assert read_all(identity.uri(resumed)) == read_all(identity.uri(whole))


def test_deleted_manifest_is_rebuilt_from_the_shards(tmp_store: str) -> None:
    ref = run_sharded_stage(IDENTITY, tmp_store, 3, Maker(), reject_budget=0.1)
    before = read_all(ref.uri)
    (Path(ref.uri) / MANIFEST_NAME).unlink()
    maker = Maker()
    assert run_sharded_stage(IDENTITY, tmp_store, 3, maker, reject_budget=0.1) == ref
    assert maker.made == []
    assert read_all(ref.uri) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_damaged_leftover_is_made_again(store_root: str, damage: str) -> None:
    whole = run_sharded_stage(IDENTITY, join_uri(store_root, "whole"), 3, Maker(), reject_budget=0.1)
    good = read_bytes(join_uri(whole.uri, "shard-00001.parquet"))
    damaged = {"truncated": good[:-10], "empty": b"", "foreign": encode_shard(pa.table({"x": [1]}))}[damage]
    left = join_uri(store_root, "left")
    write_bytes(join_uri(IDENTITY.uri(left), "shard-00001.parquet"), damaged)
    maker = Maker()
    ref = run_sharded_stage(IDENTITY, left, 3, maker, reject_budget=0.1)
    assert maker.made == [0, 1, 2]
    assert read_all(ref.uri) == read_all(whole.uri)


def test_leftover_with_any_byte_altered_is_made_again(tmp_store: str) -> None:
    whole = run_sharded_stage(IDENTITY, join_uri(tmp_store, "whole"), 1, Maker(), reject_budget=0.1)
    good = read_bytes(join_uri(whole.uri, "shard-00000.parquet"))
    writer = b"parquet-cpp-arrow version"
    start = good.rindex(writer)  # in the writer's own name a change reads as another version's file, which is accepted
    for position in (at for at in range(0, len(good), 7) if not start <= at < start + len(writer) + 8):
        left = join_uri(tmp_store, f"left-{position}")
        altered = good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :]
        write_bytes(join_uri(IDENTITY.uri(left), "shard-00000.parquet"), altered)
        maker = Maker()
        ref = run_sharded_stage(IDENTITY, left, 1, maker, reject_budget=0.1)
        assert maker.made == [0], f"the byte at {position} was altered and not noticed"
        assert read_bytes(join_uri(ref.uri, "shard-00000.parquet")) == good


def test_leftover_of_another_sharding_is_made_again(tmp_store: str) -> None:
    def stop_before_the_seal(told: ShardProgress) -> None:
        if told.num_done == told.num_shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sharded_stage(IDENTITY, tmp_store, 2, Maker(), reject_budget=0.1, on_progress=stop_before_the_seal)
    maker = Maker()
    run_sharded_stage(IDENTITY, tmp_store, 3, maker, reject_budget=0.1)
    assert maker.made == [0, 1, 2]


def test_concurrent_runs_of_one_stage_end_in_one_readable_manifest(store_root: str) -> None:
    # Each run makes other rows, as a stage on a GPU may: what is sealed must still be one whole.
    start = threading.Barrier(4)

    def run(_: int) -> str:
        start.wait()
        return run_sharded_stage(
            IDENTITY, store_root, 3, lambda index: (pa.table({"run": [f"{index} {uuid.uuid4()}"]}), [])
        ).uri

    with ThreadPoolExecutor(4) as pool:
        uris = set(pool.map(run, range(4)))
    assert len(uris) == 1
    table = open_manifest(uris.pop()).read_table()
    assert [row.split()[0] for row in table["run"].to_pylist()] == ["0", "1", "2"]


def test_rejects_past_the_budget_fail_the_stage_and_say_which(tmp_store: str) -> None:
    with pytest.raises(ValueError, match="rejected") as caught:
        run_sharded_stage(IDENTITY, tmp_store, 4, Maker(), reject_budget=0.05)
    assert str(caught.value) == (
        "stage numbers rejected 4 of 44 samples, more than the budget of 5.00%: 0-0: its image is empty; "
        "1-0: its image is empty; 2-0: its image is empty"
    )
    assert not is_sealed(IDENTITY.uri(tmp_store))
    # A greater budget is a decision of the user's, and costs no work.
    maker = Maker()
    assert run_sharded_stage(IDENTITY, tmp_store, 4, maker, reject_budget=0.1).rows == 40
    assert maker.made == []


@pytest.mark.parametrize(("budget", "is_kept"), [(0.5, True), (0.49, False)])
def test_budget_itself_may_be_used_up(tmp_store: str, budget: float, is_kept: bool) -> None:
    refusal = nullcontext() if is_kept else pytest.raises(ValueError, match="rejected 20 of 40 samples")
    with refusal:
        run_sharded_stage(IDENTITY, tmp_store, 2, Maker(10), reject_budget=budget)
    assert is_sealed(IDENTITY.uri(tmp_store)) is is_kept


def test_stage_without_shards_is_refused(tmp_store: str) -> None:
    with pytest.raises(ValueError, match="stage numbers has 0 shards to make"):
        run_sharded_stage(IDENTITY, tmp_store, 0, Maker())


def test_bytes_of_a_shard_follow_from_its_rows_alone() -> None:
    draw = random.Random(0)
    # Rows as large as images: only then do the pages of a chunked table end elsewhere.
    whole = pa.table({"x": list(range(200)), "image": [draw.randbytes(30_000) for _ in range(200)]})
    pieces = pa.concat_tables([whole.slice(start, 50) for start in range(0, 200, 50)])
    assert encode_shard(pieces) == encode_shard(whole)
    assert pq.ParquetFile(pa.BufferReader(encode_shard(whole))).num_row_groups == 4


def test_metadata_of_the_rows_reaches_the_readers(tmp_store: str) -> None:
    metadata = {b"huggingface": b'{"info": {}}'}

    def make(index: int) -> ShardRows:
        return pa.table({"x": [index]}).replace_schema_metadata(metadata), []

    ref = run_sharded_stage(IDENTITY, tmp_store, 2, make)
    assert open_manifest(ref.uri).read_table().schema.metadata == metadata
    assert pq.read_schema(Path(ref.uri) / "shard-00001.parquet").metadata[b"huggingface"] == metadata[b"huggingface"]


def test_over_its_budget_a_stage_makes_again_what_an_earlier_run_rejected_and_nothing_else(store_root: str) -> None:
    broken = {1, 3}

    def make_shard(index: int) -> ShardRows:
        made.append(index)
        rejects = [Reject(sample_id=f"{index}", reason="its image is empty")] if index in broken else []
        return pa.table({"x": range(10 * index, 10 * index + 10 - len(rejects))}), rejects

    made: list[int] = []
    with pytest.raises(ValueError, match="rejected 2 of 50 samples"):
        run_sharded_stage(IDENTITY, store_root, 5, make_shard)
    assert made == [0, 1, 2, 3, 4]
    made.clear()
    broken.remove(3)
    with pytest.raises(ValueError, match="rejected 1 of 50 samples"):
        run_sharded_stage(IDENTITY, store_root, 5, make_shard, reject_budget=0.0)
    assert made == [1, 3]
    broken.remove(1)
    ref = run_sharded_stage(IDENTITY, store_root, 5, make_shard, reject_budget=0.0)
    assert open_manifest(ref.uri).counts == {"rows": 50, "rejects": 0}
    assert open_manifest(ref.uri).read_table()["x"].to_pylist() == list(range(50))


def test_within_its_budget_a_stage_keeps_what_an_earlier_run_left(tmp_store: str) -> None:
    make_shards(IDENTITY, tmp_store, 3, Maker(), [0, 1])
    maker = Maker()
    run_sharded_stage(IDENTITY, tmp_store, 3, maker, reject_budget=0.1)
    assert maker.made == [2]
