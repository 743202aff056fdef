"""The digest of a source covers exactly the files that it names: each of them, through links, and no other."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.data.sources import digest as module
from prompt_diffusion.data.sources.base import locate
from prompt_diffusion.data.sources.digest import digest_files
from prompt_diffusion.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig, open_instruct_pix2pix
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.store.storage import list_sizes, write_bytes
from prompt_diffusion.store.uris import join_uri


def make_png(value: int) -> bytes:
    """Pictures of one colour: files of one size, whatever the colour."""
    return encode_png(np.full((8, 8, 3), value, np.uint8))


def make_image_folder(folder: Path, names: tuple[str, ...] = ("a.png", "b.png")) -> Callable[[], str]:
    """Write a table of images and the images; return what digests them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        place = Path(os.path.normpath(folder / name)) if ".." in name else folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(make_png(number))
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *(f"{name},x" for name in names)]))
    return lambda: ImageFolderSource(ImageFolderConfig(uri=str(folder)), 8).digest()


def make_pair_folder(folder: Path) -> Callable[[], str]:
    (folder / "g").mkdir(parents=True)
    (folder / "seeds.json").write_text(json.dumps([["g", ["1"]]]))
    (folder / "g" / "prompt.json").write_text(json.dumps({"input": "a", "edit": "b", "output": "c"}))
    for side in (0, 1):
        (folder / "g" / f"1_{side}.jpg").write_bytes(make_png(side))
    return lambda: open_instruct_pix2pix(InstructPix2PixConfig(uri=str(folder)), 8).digest()


def make_parquet_folder(folder: Path) -> Callable[[], str]:
    folder.mkdir(parents=True)
    image = {"bytes": make_png(1), "path": None}
    row = {
        "original_prompt": "a",
        "original_image": image,
        "edit_prompt": "b",
        "edited_prompt": "c",
        "edited_image": image,
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "train-00000.parquet")
    return lambda: open_instruct_pix2pix(InstructPix2PixConfig(uri=str(folder)), 8).digest()


MAKERS = [make_image_folder, make_pair_folder, make_parquet_folder]


@pytest.mark.parametrize("make", MAKERS)
def test_stray_files_change_nothing(tmp_path: Path, make: Callable[[Path], Callable[[], str]]) -> None:
    digest = make(tmp_path / "data")
    before = digest()
    for name in (".DS_Store", "Thumbs.db", "._train-00000.parquet", "README.md", ".cache/x.parquet", "more/notes.txt"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"stray")
    assert digest() == before


@pytest.mark.parametrize("make", MAKERS)
def test_replaced_content_of_the_same_size_moves_the_digest(
    tmp_path: Path, make: Callable[[Path], Callable[[], str]]
) -> None:
    digest = make(tmp_path / "data")
    before = digest()
    name = {make_image_folder: "a.png", make_pair_folder: "g/1_1.jpg", make_parquet_folder: "train-00000.parquet"}[make]
    data = bytearray((tmp_path / "data" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "data" / name).write_bytes(data)
    assert digest() != before


def test_images_behind_a_linked_folder_are_digested(tmp_path: Path) -> None:
    digest = make_image_folder(tmp_path / "data", ("images/a.png",))
    (tmp_path / "data" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    before = digest()
    (tmp_path / "elsewhere" / "a.png").write_bytes(make_png(77))
    assert digest() != before


@pytest.mark.parametrize("name", ["../x.png", "../side/x.png"])
def test_images_beside_the_folder_are_digested(tmp_path: Path, name: str) -> None:
    digest = make_image_folder(tmp_path / "data", ("a.png", name))
    before = digest()
    (tmp_path / "data" / name).write_bytes(make_png(77))
    assert digest() != before


def test_parquet_files_behind_links_are_found_and_loops_are_not_followed(tmp_path: Path) -> None:
    make_parquet_folder(tmp_path / "real")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "gone").symlink_to("nowhere")
    assert list(list_sizes(str(folder))) == ["rows/train-00000.parquet"]
    source = open_instruct_pix2pix(InstructPix2PixConfig(uri=str(folder)), 8)
    assert [key.sample_id for key in source.plan()] == ["rows/train-00000.parquet#0"]


def test_a_missing_file_that_appears_moves_the_digest(tmp_path: Path) -> None:
    digest = make_image_folder(tmp_path / "data")
    (tmp_path / "data" / "b.png").unlink()
    before = digest()
    (tmp_path / "data" / "b.png").write_bytes(make_png(1))
    assert digest() != before


def test_what_no_file_can_be_called_is_digested_as_missing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = ["folder", "x" * 300, "half \ud83d", "null\0", "a.png/b.png"]
    assert digest_files(str(tmp_path), names) == digest_files(str(tmp_path), names)


def test_a_large_source_is_told_by_names_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HASHED_BYTES", 10)
    monkeypatch.setattr(module, "read_bytes", lambda uri: pytest.fail("it was read"))
    (tmp_path / "a.png").write_bytes(b"x" * 20)
    before = digest_files(str(tmp_path), ["a.png"])
    (tmp_path / "a.png").write_bytes(b"x" * 21)
    assert digest_files(str(tmp_path), ["a.png"]) != before


def test_the_digest_is_the_same_in_a_folder_and_on_s3(
    tmp_path: Path, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"images/{number:02d}.png" for number in range(20)] + ["../side.png", "gone.png"]
    folder = tmp_path / "data"
    for number, name in enumerate(names[:-1]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_png(number))
        write_bytes(locate(join_uri(s3_store, "data"), name), make_png(number))
    local = [digest_files(str(folder), names), digest_files(str(folder), names[:3])]
    monkeypatch.setattr(module, "read_bytes", lambda uri: pytest.fail("S3's listing has it"))
    remote = join_uri(s3_store, "data")
    assert [digest_files(remote, names), digest_files(remote, names[:3])] == local
    write_bytes(join_uri(remote, "images/07.png"), make_png(99))
    assert digest_files(remote, names) != local[0]


def test_a_name_that_leads_out_of_a_bucket_is_refused() -> None:
    assert locate("s3://bucket/a/b", "../x.png") == "s3://bucket/a/x.png"
    with pytest.raises(ValueError, match="leads out of"):
        locate("s3://bucket/a", "../../x.png")
