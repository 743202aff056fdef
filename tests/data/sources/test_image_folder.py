import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import join_uri, write_bytes

Rows = list[dict[str, Any]]


def write_csv(folder: Path, rows: Rows) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(folder: Path, rows: Rows) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def write_parquet(folder: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


WRITERS: list[Callable[[Path, Rows], None]] = [write_csv, write_jsonl, write_parquet]


def write_image(file: Path, value: int) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(encode_png(np.full((40, 60, 3), value, np.uint8)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("a.png", 10), ("b.png", 20), ("maps/a.png", 200), ("maps/b.png", 210)):
        write_image(tmp_path / name, value)
    return tmp_path


def read_all(uri: object, condition: str | None = None) -> list[ImagePair | Reject]:
    source = ImageFolderSource(ImageFolderConfig(uri=str(uri), condition=condition), 32)
    return list(source.read(source.plan()))


def expect_pair(item: ImagePair | Reject) -> ImagePair:
    assert isinstance(item, ImagePair), item
    return item


@pytest.mark.parametrize("write", WRITERS)
def test_captioned_images_are_read_from_any_table(folder: Path, write: Callable[[Path, Rows], None]) -> None:
    write(folder, [{"file_name": "b.png", "caption": "an émigré, smiling"}, {"file_name": "a.png", "caption": "two"}])
    first, second = map(expect_pair, read_all(folder))
    assert (first.sample_id, first.group_id, first.input_prompt) == ("b.png", "b.png", "an émigré, smiling")
    assert first.edited_prompt == first.input_prompt
    assert decode_image(first.edited_image).shape == (32, 32, 3)
    assert (decode_image(first.edited_image) == 20).all()
    assert (decode_image(second.input_image) == 10).all()
    assert not first.exact_maps


def test_a_group_column_joins_images(folder: Path) -> None:
    rows = [{"file_name": name, "caption": "x", "group": "g"} for name in ("a.png", "b.png", "maps/a.png")]
    write_csv(folder, [*rows[:2], {**rows[2], "group": ""}])
    pairs = [expect_pair(item) for item in read_all(folder)]
    assert [(pair.group_id, pair.seed) for pair in pairs] == [("g", 0), ("g", 1), ("maps/a.png", 0)]


def test_pairs_of_an_own_vision_task_carry_their_source_as_the_exact_map(folder: Path) -> None:
    write_jsonl(
        folder,
        [
            {"source_file_name": f"maps/{name}", "target_file_name": name, "caption": name}
            for name in ("a.png", "b.png")
        ],
    )
    _, pair = map(expect_pair, read_all(folder, "sketch"))
    assert pair.sample_id == "b.png"
    assert (decode_image(pair.edited_image) == 20).all()
    of_input, of_edited = pair.exact_maps["sketch"]
    assert of_input == of_edited
    assert (decode_image(of_edited) == 210).all()


def test_what_is_broken_is_rejected_with_its_reason(folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    lines = [
        {"file_name": "a.png", "caption": "fine"},
        {"file_name": "b.png"},
        {"file_name": "broken.png", "caption": "x"},
        {"file_name": "gone.png", "caption": "x"},
        {"caption": "x"},
        {"file_name": "a.png", "caption": ["x"]},
    ]
    text = "\n".join([*(json.dumps(line) for line in lines), "{", "7"])
    (folder / "metadata.jsonl").write_text(text)
    first, *rest = read_all(folder)
    expect_pair(first)
    assert all(isinstance(item, Reject) for item in rest)
    reasons = [(item.sample_id, item.reason) for item in rest if isinstance(item, Reject)]
    assert [reason[0] for reason in reasons] == [
        "b.png", "broken.png", "gone.png", "metadata.jsonl#4", "a.png", "metadata.jsonl#6", "metadata.jsonl#7"
    ]  # fmt: skip
    starts = (
        "the caption is missing: caption",
        "broken.png: the image cannot be decoded",
        "gone.png is missing",
        "file_name is missing",
        "caption is a list, not a text",
        "line 7 is not JSON",
        "line 8 is not a JSON object",
    )
    for (_, reason), start in zip(reasons, starts, strict=True):
        assert reason.startswith(start)


def test_a_short_csv_row_lacks_its_caption(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,caption\na.png\nb.png,ok\n")
    first, second = read_all(folder)
    assert first == Reject(sample_id="a.png", reason="the caption is missing: caption")
    expect_pair(second)


def test_a_table_without_the_columns_is_refused_with_what_it_has(folder: Path) -> None:
    write_csv(folder, [{"image": "a.png", "text": "x"}])
    with pytest.raises(ValueError, match="has no columns file_name, caption; it has image, text"):
        read_all(folder)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet", "metadata.jsonl"])
def test_an_unreadable_table_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xff\xfe\x00file_name")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_all(folder)


@pytest.mark.parametrize("num_tables", [0, 2])
def test_exactly_one_table_is_needed(folder: Path, num_tables: int) -> None:
    for write in WRITERS[:num_tables]:
        write(folder, [{"file_name": "a.png", "caption": "x"}])
    with pytest.raises(ValueError, match="needs one table out of"):
        read_all(folder)


def test_the_digest_sees_captions_and_images_and_not_the_place(tmp_path: Path) -> None:
    digests = []
    plain, other = (np.random.default_rng(seed).integers(0, 9 * (seed + 1), (40, 40, 3), np.uint8) for seed in (0, 1))
    for place, caption, image in (("a", "one", plain), ("b", "one", plain), ("c", "two", plain), ("d", "one", other)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.png").write_bytes(encode_png(image))
        write_csv(tmp_path / place, [{"file_name": "x.png", "caption": caption}])
        digests.append(ImageFolderSource(ImageFolderConfig(uri=str(tmp_path / place)), 32).digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_condition_must_be_usable_as_a_name() -> None:
    with pytest.raises(ValidationError, match="condition"):
        ImageFolderConfig(uri="x", condition="My Sketch")


def test_images_are_read_from_s3_too(s3_store: str) -> None:
    write_bytes(join_uri(s3_store, "a.png"), encode_png(np.full((40, 40, 3), 77, np.uint8)))
    write_bytes(join_uri(s3_store, "metadata.csv"), b"file_name,caption\na.png,grey\n")
    (pair,) = read_all(s3_store)
    assert (decode_image(expect_pair(pair).input_image) == 77).all()


def test_a_pair_of_two_shapes_is_rejected_and_one_of_two_sizes_is_not(folder: Path) -> None:
    (folder / "tall.png").write_bytes(encode_png(np.zeros((60, 40, 3), np.uint8)))
    (folder / "small.png").write_bytes(encode_png(np.zeros((20, 30, 3), np.uint8)))
    rows = [
        {"source_file_name": source, "target_file_name": target, "caption": "x"}
        for source, target in (("tall.png", "a.png"), ("small.png", "b.png"))
    ]
    write_csv(folder, rows)
    refused, taken = read_all(folder, condition="sketch")
    assert isinstance(refused, Reject)
    assert refused.reason == "source and target differ in shape: tall.png 40 x 60 and a.png 60 x 40 pixels"
    expect_pair(taken)
