"""What is sealed is read back and checked; what is not sealed, truncated, altered or missing is refused by name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.store.fingerprint import StageIdentity, StageInput, compute_digest
from prompt_diffusion.store.manifest import (
    MANIFEST_NAME,
    DamagedDataError,
    Manifest,
    ManifestRef,
    Reject,
    StoredFile,
    UnsealedError,
    find_sealed,
    is_sealed,
    open_manifest,
)
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder
from prompt_diffusion.store.sharded import run_sharded_stage
from prompt_diffusion.store.storage import list_files, read_bytes, write_bytes
from prompt_diffusion.store.uris import join_uri

IDENTITY = StageIdentity(
    stage="train",
    version=3,
    config={"steps": 10, "rates": (0.1, 0.2)},
    inputs=(StageInput(role="pairs", fingerprint="ab"),),
)


def seal_weights(root: str) -> ManifestRef:
    """Seal a small stage without shards: two files of a model, a JSON file beside them."""
    files = [
        write_file(IDENTITY, root, "pipeline/unet/weights.bin", b"weights" * 1000),
        write_file(IDENTITY, root, "pipeline/index.json", b"{}"),
        write_file(IDENTITY, root, "losses.json", b"[1, 2]", rows=2),
    ]
    return seal_manifest(IDENTITY, root, files, counts={"steps": 10}, rejects=[Reject(sample_id="a", reason="b")])


def seal_shards(root: str) -> ManifestRef:
    return find_sealed(IDENTITY, root) or run_sharded_stage(
        IDENTITY, root, 2, lambda index: (pa.table({"x": [index] * 5, "y": ["a"] * 5}), [])
    )


def test_all_that_was_sealed_is_read_back(store_root: str) -> None:
    ref = seal_weights(store_root)
    manifest = open_manifest(ref.uri)
    assert manifest.ref == ref == find_sealed(IDENTITY, store_root)
    assert ref == ManifestRef(uri=IDENTITY.uri(store_root), stage="train", fingerprint=IDENTITY.fingerprint, rows=2)
    assert manifest.identity == IDENTITY
    assert manifest.counts == {"steps": 10}
    assert manifest.rejects == (Reject(sample_id="a", reason="b"),)
    assert manifest.versions["pyarrow"] == pa.__version__
    assert manifest.shards == ()
    assert [file.path for file in manifest.files] == [
        "losses.json", "pipeline/index.json", "pipeline/unet/weights.bin",
    ]  # fmt: skip
    assert manifest.files[0] == StoredFile("losses.json", 2, 6, compute_digest(b"[1, 2]"))
    assert manifest.read_file("losses.json") == b"[1, 2]"


def test_manifest_is_a_table_that_anything_reads(tmp_store: str) -> None:
    table = pq.read_table(Path(seal_weights(tmp_store).uri) / MANIFEST_NAME)
    assert table.column_names == ["path", "rows", "bytes", "sha256"]
    content = json.loads(table.schema.metadata[b"prompt_diffusion"])
    assert content["fingerprint"] == IDENTITY.fingerprint
    assert content["identity"] == IDENTITY.model_dump(mode="json")


def test_unsealed_folder_is_refused_by_name(store_root: str) -> None:
    uri = IDENTITY.uri(store_root)
    write_file(IDENTITY, store_root, "losses.json", b"[]")
    assert not is_sealed(uri)
    assert find_sealed(IDENTITY, store_root) is None
    with pytest.raises(UnsealedError, match=f"{uri} is not sealed"):
        open_manifest(uri)


@pytest.mark.parametrize("path", ["shard-00001.parquet", MANIFEST_NAME])
def test_truncated_file_is_refused_by_name(store_root: str, path: str) -> None:
    uri = join_uri(seal_shards(store_root).uri, path)
    write_bytes(uri, read_bytes(uri)[:-1])
    with pytest.raises(DamagedDataError, match=uri):
        open_manifest(IDENTITY.uri(store_root))
    with pytest.raises(DamagedDataError, match=uri):
        find_sealed(IDENTITY, store_root)


def test_altered_shard_is_refused_by_name(store_root: str) -> None:
    manifest = open_manifest(seal_shards(store_root).uri)
    uri = join_uri(manifest.ref.uri, "shard-00001.parquet")
    data = bytearray(read_bytes(uri))
    data[30] ^= 1
    write_bytes(uri, bytes(data))
    reopened = open_manifest(manifest.ref.uri)  # the sizes are right
    assert reopened.read_shard(reopened.shards[0]).num_rows == 5
    with pytest.raises(DamagedDataError, match=f"{uri} has the digest"):
        reopened.read_shard(reopened.shards[1])
    with pytest.raises(DamagedDataError, match=f"{uri} has the digest"):
        reopened.read_table(["x"])


def test_missing_shard_is_refused_by_name(tmp_store: str, tmp_path: Path) -> None:
    manifest = open_manifest(seal_shards(tmp_store).uri)
    missing = Path(manifest.ref.uri) / "shard-00000.parquet"
    missing.unlink()
    with pytest.raises(DamagedDataError, match=f"{missing} is missing"):
        open_manifest(manifest.ref.uri)
    with pytest.raises(DamagedDataError, match=f"{missing} is missing"):
        manifest.read_table()
    with pytest.raises(DamagedDataError, match=f"{missing} is missing"):
        manifest.fetch_folder("", tmp_path / "cache")


def test_damaged_stage_is_made_anew_as_its_refusal_says(tmp_store: str) -> None:
    ref = seal_shards(tmp_store)
    before = {name: read_bytes(join_uri(ref.uri, name)) for name in list_files(ref.uri)}
    write_bytes(join_uri(ref.uri, "shard-00000.parquet"), b"damaged")
    with pytest.raises(DamagedDataError, match=f"delete {ref.uri}/{MANIFEST_NAME} and run its stage again"):
        seal_shards(tmp_store)
    (Path(ref.uri) / MANIFEST_NAME).unlink()
    assert seal_shards(tmp_store) == ref
    assert {name: read_bytes(join_uri(ref.uri, name)) for name in list_files(ref.uri)} == before


def test_wrong_row_count_is_refused(tmp_store: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2, 3]}), sink)
    shard = write_file(IDENTITY, tmp_store, "shard-00000.parquet", sink.getvalue().to_pybytes(), rows=4)
    manifest = open_manifest(seal_manifest(IDENTITY, tmp_store, [shard], counts={}).uri)
    with pytest.raises(DamagedDataError, match=r"shard-00000\.parquet has 3 rows, sealed with 4"):
        manifest.read_table()


def edit_manifest(uri: str, change: str) -> None:
    """Rewrite a manifest as valid Parquet that says something else."""
    path = Path(uri) / MANIFEST_NAME
    table = pq.read_table(path)
    content = json.loads(table.schema.metadata[b"prompt_diffusion"])
    if change == "config":
        content["identity"]["config"]["steps"] = 11
    elif change == "rejects":
        content["rejects"] = []
    elif change == "digest gone":
        del content["digest"]
    elif change == "path":
        paths = pa.array(["../../stolen", *table["path"].to_pylist()[1:]])
        table = table.set_column(0, "path", paths)
    metadata = {} if change == "metadata gone" else {b"prompt_diffusion": json.dumps(content).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("change", ["config", "rejects", "digest gone", "metadata gone", "path"])
def test_altered_manifest_is_refused_by_name(tmp_store: str, change: str) -> None:
    ref = seal_weights(tmp_store)
    edit_manifest(ref.uri, "nothing")
    assert open_manifest(ref.uri).ref == ref
    edit_manifest(ref.uri, change)
    with pytest.raises(DamagedDataError, match=f"{ref.uri}/{MANIFEST_NAME} cannot be used"):
        open_manifest(ref.uri)


def test_manifest_of_another_identity_in_its_place_is_refused(tmp_store: str) -> None:
    other = IDENTITY.model_copy(update={"version": 4})
    Path(seal_weights(tmp_store).uri).rename(Path(tmp_store) / "train" / other.fingerprint)
    with pytest.raises(DamagedDataError, match=f"holds the manifest of {IDENTITY.fingerprint}"):
        find_sealed(other, tmp_store)


def test_folder_is_written_and_fetched_as_it_was(store_root: str, tmp_path: Path) -> None:
    source = tmp_path / "saved"
    contents = {"index.json": b"{}", "unet/weights.bin": b"w" * 5_000_000, "vae/config.json": b""}
    for name, data in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    files = write_folder(IDENTITY, store_root, "pipeline", source)
    ref = seal_manifest(IDENTITY, store_root, [*files, write_file(IDENTITY, store_root, "c.json", b"1")], counts={})
    folder = open_manifest(ref.uri).fetch_folder("pipeline", tmp_path / "cache")
    assert {name: read_bytes(str(folder / name)) for name in list_files(str(folder))} == contents


def test_second_fetch_copies_only_what_is_not_right(store_root: str, tmp_path: Path) -> None:
    manifest = open_manifest(seal_weights(store_root).uri)
    folder = manifest.fetch_folder("pipeline", tmp_path)
    kept, damaged = folder / "index.json", folder / "unet" / "weights.bin"
    mark = kept.stat().st_mtime_ns, kept.stat().st_ino
    damaged.write_bytes(b"Weights" + damaged.read_bytes()[7:])
    assert manifest.fetch_folder("pipeline", tmp_path) == folder
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == mark
    assert damaged.read_bytes() == b"weights" * 1000


def test_fetch_of_an_altered_file_leaves_nothing(store_root: str, tmp_path: Path) -> None:
    manifest = open_manifest(seal_weights(store_root).uri)
    uri = join_uri(manifest.ref.uri, "pipeline/unet/weights.bin")
    write_bytes(uri, b"Weights" * 1000)
    with pytest.raises(DamagedDataError, match=f"{uri} has the digest"):
        manifest.fetch_folder("pipeline/unet", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_unknown_names_are_refused_with_what_there_is(tmp_store: str) -> None:
    manifest = open_manifest(seal_shards(tmp_store).uri)
    with pytest.raises(ValueError, match=r"has no column 'z', only x, y"):
        manifest.read_table(["z"])
    with pytest.raises(ValueError, match=r"has no file 'z', only shard-00000\.parquet, shard-00001\.parquet"):
        manifest.read_file("z")
    with pytest.raises(ValueError, match=r"has no files below 'pipeline'"):
        manifest.fetch_folder("pipeline", Path(tmp_store))
    assert manifest.read_table(["y"]).column_names == ["y"]


LIGHT = ["sample_id", "caption", "split", "seed"]


def seal_light_columns(root: str, num_shards: int = 1) -> Manifest:
    """Seal shards of light columns beside images, as image pairs have them."""
    random = np.random.default_rng(0)

    def make(index: int) -> tuple[pa.Table, list[Reject]]:
        content = {
            "sample_id": [f"s{index}-{row}" for row in range(100)],
            "caption": [f"a red cube, number {number:.6f}" for number in random.random(100)],
            "image": [random.bytes(50) for _ in range(100)],
            "split": ["train" if row % 3 else "test" for row in range(100)],
            "seed": list(range(100)),
        }
        return pa.table(content), []

    return open_manifest(run_sharded_stage(IDENTITY, root, num_shards, make).uri)


@pytest.mark.parametrize("part", ["pages", "footer"])
def test_a_flipped_bit_in_light_columns_is_refused_by_name_or_changes_nothing(tmp_store: str, part: str) -> None:
    manifest = seal_light_columns(tmp_store)
    path = Path(manifest.ref.uri) / manifest.shards[0].path
    expected, data = manifest.read_index(LIGHT), path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    start, stop = (0, footer) if part == "pages" else (footer, len(data))
    refused = []
    for position in range(start, stop, max(1, (stop - start) // 1500)):
        altered = bytearray(data)
        altered[position] ^= 1 << (position % 8)
        path.write_bytes(altered)
        try:
            assert manifest.read_index(LIGHT) == expected, f"byte {position} of {len(data)}"
        except DamagedDataError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert [reason for reason in refused if not reason.startswith(f"{path} ") or "\n" in reason] == []
    path.write_bytes(data)
    assert manifest.read_index(LIGHT) == expected


@pytest.mark.parametrize("name", LIGHT)
def test_a_column_whose_type_was_altered_is_refused(tmp_store: str, name: str) -> None:
    manifest = seal_light_columns(tmp_store)
    path = Path(manifest.ref.uri) / manifest.shards[0].path
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    place = data.index(name.encode(), footer) + len(name)
    refused = 0
    for position in range(place, place + 6):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            path.write_bytes(altered)
            try:
                assert manifest.read_index(LIGHT).schema.types == [pa.string(), pa.string(), pa.string(), pa.int64()]
            except DamagedDataError:
                refused += 1
    assert refused > 0


def test_a_store_that_fails_is_not_taken_for_damage(tmp_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = seal_light_columns(tmp_store)
    path = Path(manifest.ref.uri) / manifest.shards[0].path
    path.unlink()
    path.mkdir()  # the system's own error, with a number: retried, as it should be
    with pytest.raises(IsADirectoryError):
        manifest.read_index(LIGHT)
    path.rmdir()
    with pytest.raises(DamagedDataError, match="is missing"):
        manifest.read_index(LIGHT)
