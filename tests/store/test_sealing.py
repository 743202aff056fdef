"""A stage's files stay below its folder, and of many seals the first counts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prompt_diffusion.store.fingerprint import StageIdentity, compute_digest
from prompt_diffusion.store.manifest import (
    MANIFEST_NAME,
    DamagedDataError,
    ManifestRef,
    StoredFile,
    is_sealed,
    open_manifest,
)
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder
from prompt_diffusion.store.storage import list_files

IDENTITY = StageIdentity(stage="train", version=3, config={"steps": 10}, inputs=())


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "", MANIFEST_NAME])
def test_file_outside_its_folder_is_not_written(tmp_store: str, path: str) -> None:
    with pytest.raises(DamagedDataError, match="cannot hold a file at the path"):
        write_file(IDENTITY, tmp_store, path, b"x")
    assert list_files(tmp_store) == []


def test_seal_of_a_file_that_is_not_there_is_refused(store_root: str) -> None:
    with pytest.raises(DamagedDataError, match=r"gone\.bin"):
        seal_manifest(IDENTITY, store_root, [StoredFile("gone.bin", 0, 4, compute_digest(b"gone"))], counts={})
    assert not is_sealed(IDENTITY.uri(store_root))


def test_of_many_concurrent_seals_one_wins_and_all_return_it(store_root: str) -> None:
    file = write_file(IDENTITY, store_root, "losses.json", b"[]")
    start = threading.Barrier(12)

    def seal(run: int) -> ManifestRef:
        start.wait()
        return seal_manifest(IDENTITY, store_root, [file], counts={"rows": run})

    with ThreadPoolExecutor(12) as pool:
        refs = list(pool.map(seal, range(12)))
    assert {ref.rows for ref in refs} == {open_manifest(refs[0].uri).counts["rows"]}
    assert list_files(refs[0].uri) == ["losses.json", MANIFEST_NAME]


def test_late_run_changes_no_file_of_a_sealed_stage(store_root: str, tmp_path: Path) -> None:
    files = [
        write_file(IDENTITY, store_root, "pipeline/index.json", b"{}"),
        write_file(IDENTITY, store_root, "losses.json", b"[1, 2]"),
    ]
    ref = seal_manifest(IDENTITY, store_root, files, counts={})
    late = write_file(IDENTITY, store_root, "losses.json", b"[3, 4]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "index.json").write_bytes(b"[]")
    late_folder = write_folder(IDENTITY, store_root, "pipeline", tmp_path / "model")
    assert seal_manifest(IDENTITY, store_root, [late, *late_folder], counts={}) == ref
    assert open_manifest(ref.uri).read_file("losses.json") == b"[1, 2]"
    assert open_manifest(ref.uri).read_file("pipeline/index.json") == b"{}"
