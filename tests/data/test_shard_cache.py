import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from prompt_diffusion.data.records import IMAGE_TYPE, arrays_table
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import DamagedDataError, open_manifest
from prompt_diffusion.store.sharded import run_sharded_stage

ROWS, SHARDS = 5, 4


def make_images(shard):
    rng = np.random.default_rng(shard)
    colour = rng.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
    grey = np.repeat(rng.integers(0, 256, (ROWS, 8, 8, 1), dtype=np.uint8), 3, axis=3)
    return colour, grey, rng.standard_normal((ROWS, 2, 3)).astype(np.float32)


def make_shard(shard):
    colour, grey, values = make_images(shard)
    table = arrays_table({"sample_id": [f"{shard}-{row}" for row in range(ROWS)]}, {"values": values})
    for name, images in (("photo", colour), ("map", grey)):
        cells = [{"bytes": encode_png(image), "path": None} for image in images]
        table = table.append_column(pa.field(name, IMAGE_TYPE), pa.array(cells, IMAGE_TYPE))
    return table, []


@pytest.fixture
def manifest(store_root):
    identity = StageIdentity(stage="test", version=1, config={}, inputs=())
    return open_manifest(run_sharded_stage(identity, store_root, SHARDS, make_shard).uri)


@pytest.fixture
def local_manifest(tmp_store):
    identity = StageIdentity(stage="test", version=1, config={}, inputs=())
    return open_manifest(run_sharded_stage(identity, tmp_store, SHARDS, make_shard).uri)


def check_every_row(cache, manifest):
    for shard in range(SHARDS):
        colour, grey, values = make_images(shard)
        for row in range(ROWS):
            np.testing.assert_array_equal(cache.read_row(manifest, shard, "photo", row), colour[row])
            np.testing.assert_array_equal(cache.read_row(manifest, shard, "map", row), grey[row, ..., :1])
            np.testing.assert_array_equal(cache.read_row(manifest, shard, "values", row), values[row])


def test_every_row_comes_back_and_a_grey_column_as_one_channel(manifest, tmp_path):
    check_every_row(ShardCache(tmp_path / "cache"), manifest)


def test_what_is_cached_is_read_without_the_store_and_by_another_process_cache(manifest, tmp_path):
    for shard in range(SHARDS):
        ShardCache(tmp_path / "cache").fetch(manifest, shard)
    elsewhere = manifest.ref.model_copy(update={"uri": str(tmp_path / "gone")})
    check_every_row(ShardCache(tmp_path / "cache"), replace(manifest, ref=elsewhere))


def test_threads_that_ask_for_one_shard_fetch_it_once(manifest, tmp_path, monkeypatch):
    reads = []
    read_shard = type(manifest).read_shard
    monkeypatch.setattr(
        type(manifest), "read_shard", lambda self, shard: reads.append(shard) or read_shard(self, shard)
    )
    caches, start = [ShardCache(tmp_path / "cache") for _ in range(4)], threading.Barrier(4)

    def read(cache):
        start.wait()
        return cache.read_row(manifest, 1, "values", 2)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, caches))
    assert len(reads) == 1
    for result in results:
        np.testing.assert_array_equal(result, make_images(1)[2][2])


def test_a_limit_deletes_the_least_recently_used_and_no_row_is_lost(manifest, tmp_path):
    shard_bytes = ROWS * (8 * 8 * 3 + 8 * 8 + 2 * 3 * 4)
    cache = ShardCache(tmp_path / "cache", max_bytes=int(2.8 * shard_bytes))
    for _ in range(2):
        check_every_row(cache, manifest)
        entries = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
        assert len(entries) == 2
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name != ".locks" and path.name.startswith(".")]


def test_an_entry_that_another_process_deleted_is_fetched_again(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    check_every_row(cache, manifest)
    for entry in (tmp_path / "cache").iterdir():
        if entry.name != ".locks":
            shutil.rmtree(entry)
    check_every_row(cache, manifest)


def test_a_damaged_shard_is_refused_and_leaves_nothing(manifest, tmp_path):
    from prompt_diffusion.store.storage import read_bytes, write_bytes
    from prompt_diffusion.store.uris import join_uri

    uri = join_uri(manifest.ref.uri, manifest.shards[2].path)
    data = bytearray(read_bytes(uri))
    data[100] ^= 1
    write_bytes(uri, bytes(data))
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(DamagedDataError, match="shard-00002"):
        cache.read_row(manifest, 2, "photo", 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


def test_an_unknown_column_and_an_unknown_row_are_named(manifest, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="has no column 'depth', only values, photo, map"):
        cache.read_row(manifest, 0, "depth", 0)
    with pytest.raises(IndexError, match=f"has no row {ROWS}"):
        cache.read_row(manifest, 0, "photo", ROWS)


def test_the_index_is_read_without_fetching_images(manifest):
    index = manifest.read_index(["sample_id"])
    assert index.column_names == ["sample_id"]
    assert index["sample_id"].to_pylist() == [f"{shard}-{row}" for shard in range(SHARDS) for row in range(ROWS)]


def list_entries(cache):
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def turn_into_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": zero,
    "flipped": flip,
    "cut short": cut,
    "a folder": turn_into_folder,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["layout.json", "column-000", "column-001", "column-002"])
def test_an_entry_that_is_not_as_it_was_written_is_made_anew(local_manifest, tmp_path, file, damage):
    def list_files():
        return {path: path.stat().st_ino for entry in list_entries(tmp_path / "cache") for path in entry.iterdir()}

    check_every_row(ShardCache(tmp_path / "cache"), local_manifest)
    for entry in list_entries(tmp_path / "cache"):
        DAMAGES[damage](entry / file)
    check_every_row(ShardCache(tmp_path / "cache"), local_manifest)
    files = list_files()
    assert {path.name for path in files} == {"layout.json", "column-000", "column-001", "column-002"}
    check_every_row(ShardCache(tmp_path / "cache"), local_manifest)
    assert list_files() == files  # what stands there now serves the next process as it is


@pytest.mark.parametrize("damage", ["deleted", "empty", "a folder", "a link to nothing"])
def test_a_column_that_goes_while_it_is_open_is_made_anew(local_manifest, tmp_path, damage):
    cache = ShardCache(tmp_path / "cache")
    check_every_row(cache, local_manifest)
    for entry in list_entries(tmp_path / "cache"):
        DAMAGES[damage](entry / "column-001")
    check_every_row(cache, local_manifest)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", '{"content": 3, "digest": 3}', "{", '{"photo": {"shape": [8]}}']
)
def test_any_other_layout_is_made_anew(local_manifest, tmp_path, content):
    ShardCache(tmp_path / "cache").fetch(local_manifest, 0)
    (entry,) = list_entries(tmp_path / "cache")
    (entry / "layout.json").write_text(content)
    check_every_row(ShardCache(tmp_path / "cache"), local_manifest)


def test_a_file_in_the_place_of_an_entry_is_replaced(local_manifest, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / local_manifest.shards[0].sha256).write_text("no folder")
    check_every_row(ShardCache(tmp_path / "cache"), local_manifest)


def test_a_cache_that_keeps_nothing_is_an_error_and_no_endless_loop(local_manifest, tmp_path, monkeypatch):
    fill = ShardCache._fill

    def fill_and_lose(self, place, manifest, shard):
        fill(self, place, manifest, shard)
        (place / "layout.json").unlink()

    monkeypatch.setattr(ShardCache, "_fill", fill_and_lose)
    with pytest.raises(OSError, match=r"the shard cache .* loses shard-00001"):
        ShardCache(tmp_path / "cache").read_row(local_manifest, 1, "photo", 0)


def test_no_column_s_name_leads_out_of_the_cache(tmp_store, tmp_path):
    cells = [{"bytes": encode_png(np.zeros((2, 2, 3), np.uint8)), "path": None}]
    identity = StageIdentity(stage="test", version=1, config={"names": "odd"}, inputs=())
    names = ["../../../escaped", "/tmp/escaped", "layout.json", "a/b"]
    table = pa.table({name: pa.array(cells, IMAGE_TYPE) for name in names})
    manifest = open_manifest(run_sharded_stage(identity, tmp_store, 1, lambda index: (table, [])).uri)
    cache = ShardCache(tmp_path / "deep" / "cache")
    for name in names:
        assert cache.read_row(manifest, 0, name, 0).shape == (2, 2, 1)
    (entry,) = list_entries(tmp_path / "deep" / "cache")
    assert len(list(entry.iterdir())) == 5
    assert {path.name for path in tmp_path.iterdir()} <= {"deep", "store"}
