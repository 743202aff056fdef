import csv
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from prompt_diffusion.data.records import ImagePair, image_pairs_table
from prompt_diffusion.data.sources.image_folder import ImageFolderConfig, ImageFolderSource
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import write_bytes
from prompt_diffusion.store.uris import join_uri

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


def open_source(folder: Path, **options: object) -> ImageFolderSource:
    return ImageFolderSource(ImageFolderConfig.model_validate({"uri": str(folder), **options}), 32)


def find_reasons(items: list[ImagePair | Reject]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Reject)]


@pytest.mark.parametrize("write", WRITERS)
def test_only_equal_rows_are_repeats_and_their_places_are_told(
    folder: Path, write: Callable[[Path, Rows], None]
) -> None:
    captions = ("one", "two", "one", "three")
    write(folder, [{"file_name": "a.png", "caption": caption} for caption in captions])
    source = open_source(folder)
    keys = source.plan()
    items = list(source.read(keys))
    assert [item.input_prompt for item in items if isinstance(item, ImagePair)] == ["one", "two", "three"]
    assert len({item.sample_id for item in items if isinstance(item, ImagePair)}) == 3
    # One image under two captions is one group: no model is tested on the image that it was trained on.
    assert {key.group_id for key in keys} == {"a.png"}
    places = {write_csv: "line 2 and line 4", write_jsonl: "line 1 and line 3", write_parquet: "row 1 and row 3"}[write]
    assert find_reasons(items) == [f"it is listed twice in metadata.{write.__name__.removeprefix('write_')}: {places}"]


def test_one_target_may_have_several_sources(folder: Path) -> None:
    rows = [
        {"source_file_name": name, "target_file_name": "a.png", "caption": "x"} for name in ("maps/a.png", "maps/b.png")
    ]
    write_csv(folder, rows)
    pairs = [expect_pair(item) for item in read_all(folder, "sketch")]
    assert [decode_image(pair.exact_maps["sketch"][0])[0, 0, 0] for pair in pairs] == [200, 210]
    assert [pair.sample_id for pair in pairs] == ["a.png", "a.png#1"]
    assert {pair.group_id for pair in pairs} == {"a.png"}


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_group_of_zero_is_a_group(folder: Path, write: Callable[[Path, Rows], None]) -> None:
    write(folder, [{"file_name": name, "caption": "x", "group": 0} for name in ("a.png", "b.png", "maps/a.png")])
    assert {expect_pair(item).group_id for item in read_all(folder)} == {"0"}


@pytest.mark.parametrize("none", [None, "", "  ", float("nan")])
def test_none_an_empty_text_and_nan_are_no_group(folder: Path, none: object) -> None:
    write_jsonl(folder, [{"file_name": name, "caption": "x", "group": none} for name in ("a.png", "b.png")])
    assert [expect_pair(item).group_id for item in read_all(folder)] == ["a.png", "b.png"]


@pytest.mark.parametrize(("group", "kind"), [([1], "list"), ({"a": 1}, "dict")])
def test_a_group_of_many_values_is_rejected(folder: Path, group: object, kind: str) -> None:
    write_jsonl(folder, [{"file_name": "a.png", "caption": "x", "group": group}])
    assert find_reasons(read_all(folder)) == [f"group is a {kind}, not a text"]


def test_other_column_names_are_taken_and_asked_for(folder: Path) -> None:
    write_csv(folder, [{"image": "a.png", "text": "a cat"}])
    with pytest.raises(ValueError, match=r"ingest\.source\.image_column, ingest\.source\.caption_column"):
        read_all(folder)
    source = open_source(folder, image_column="image", caption_column="text")
    (item,) = source.read(source.plan())
    assert expect_pair(item).edited_prompt == "a cat"


def test_a_group_column_that_was_named_must_be_there(folder: Path) -> None:
    write_csv(folder, [{"file_name": "a.png", "caption": "x"}])
    with pytest.raises(ValueError, match=r"has no columns scene; .*ingest\.source\.group_column"):
        open_source(folder, group_column="scene").plan()


def test_header_names_with_spaces_are_quoted(folder: Path) -> None:
    write_csv(folder, [{"file_name": "a.png", " caption": "x"}])
    with pytest.raises(ValueError, match="has no columns caption; it has ' caption', file_name"):
        read_all(folder)


def test_a_folder_that_does_not_exist_and_one_without_a_table_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"metadata.parquet: there is no folder {tmp_path}/none$"):
        open_source(tmp_path / "none")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(ValueError, match=r"it has none, but there is 'train/metadata\.csv'"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="is a file: name the folder that it lies in"):
        open_source(tmp_path / "train" / "metadata.csv")


def test_an_empty_table_is_called_empty(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is empty"):
        read_all(folder)


ODD_NAMES = [
    ("maps", "maps is a folder, not a file"),
    ("x" * 300, f"{'x' * 300} cannot be read: File name too long"),
    ("x" * 2000, f"'{'x' * 40}' is no file name: it has 2000 letters, or one that no name can have"),
    ("a.png/b.png", "a.png/b.png cannot be read: Not a directory"),
    ("nu\0ll", "'nu\\x00ll' is no file name: it has 5 letters, or one that no name can have"),
    ("half \ud83d", "file_name is not Unicode: it has half of a surrogate pair, in 'half \\\\ud83d'"),
    ("maps\\a.png", "maps\\a.png is missing: write / between folders, not \\"),
    ("C:\\data\\a.png", "C:\\data\\a.png is missing: names are relative to {folder}"),
    ("/data/a.png", "/data/a.png is missing: names are relative to {folder}"),
    ("https://host/a.png", "https://host/a.png is an address: names are relative to {folder}"),
    ("a.PNG", "a.PNG is missing: there is a.png, so write the name as the file has it"),
    ("A.png", "A.png is missing: there is a.png, so write the name as the file has it"),
    ("loop.png", "loop.png cannot be read: Too many levels of symbolic links"),
    ("pipe.png", "pipe.png is a device or pipe, not a file"),
    ("gone.png", "gone.png is missing"),
]


@pytest.mark.parametrize(("name", "reason"), ODD_NAMES)
def test_a_file_name_that_leads_to_no_image_is_a_reject_that_helps(folder: Path, name: str, reason: str) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    write_jsonl(folder, [{"file_name": name, "caption": "x"}, {"file_name": "b.png", "caption": "x"}])
    first, second = read_all(folder)
    assert find_reasons([first]) == [reason.replace("{folder}", str(folder))]
    expect_pair(second)
    image_pairs_table([expect_pair(second)])
    first.model_dump_json()  # type: ignore[union-attr]


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_another_unicode_form_of_a_name_is_told(folder: Path, in_table: str, on_disk: str) -> None:
    write_image(folder / unicodedata.normalize(on_disk, "é.png"), 10)
    write_jsonl(folder, [{"file_name": unicodedata.normalize(in_table, "é.png"), "caption": "x"}])
    (reason,) = find_reasons(read_all(folder))
    assert f"the file's own name is in another Unicode form ({on_disk})" in reason


def test_half_of_a_surrogate_pair_in_a_caption_is_a_reject(folder: Path) -> None:
    write_jsonl(
        folder,
        [{"file_name": "a.png", "caption": "smile \ud83d"}, {"file_name": "b.png", "caption": "smile \U0001f600"}],
    )
    first, second = read_all(folder)
    assert find_reasons([first]) == ["caption is not Unicode: it has half of a surrogate pair, in 'smile \\\\ud83d'"]
    assert expect_pair(second).input_prompt == "smile \U0001f600"


def test_a_published_split_is_kept_or_ignored_by_choice(folder: Path) -> None:
    names = [("a.png", "val"), ("b.png", "train"), ("maps/a.png", "test"), ("maps/b.png", "")]
    write_jsonl(folder, [{"file_name": name, "caption": "x", "split": split} for name, split in names])
    kept = [key.published for key in open_source(folder).plan()]
    assert kept == ["validation", "train", "test", "train"]
    assert {key.published for key in open_source(folder, published_splits="ignore").plan()} == {None}


def test_an_unknown_split_is_a_reject(folder: Path) -> None:
    write_jsonl(folder, [{"file_name": "a.png", "caption": "x", "split": "held"}])
    assert find_reasons(read_all(folder)) == ["split is 'held': name train, validation or test"]


def test_16_bit_depth_in_millimetres_is_said_to_be_black_and_can_be_scaled(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    depth = np.array([[0, 5_000], [10_000, 12_000]], np.uint16)
    Image.fromarray(depth).save(folder / "depth.png")
    write_jsonl(folder, [{"file_name": "depth.png", "caption": "x"}])
    for options, expected in (({}, [0, 19, 39, 47]), ({"white_16_bit": 10_000}, [0, 128, 255, 255])):
        caplog.clear()
        config = ImageFolderConfig.model_validate({"uri": str(folder), **options})
        (pair,) = (expect_pair(item) for item in ImageFolderSource(config, 2).read(ImageFolderSource(config, 2).plan()))
        assert decode_image(pair.input_image)[..., 0].ravel().tolist() == expected
        assert ("ingest.source.white_16_bit" in caplog.text) is (not options)


def test_the_native_image_is_scaled_alike(folder: Path) -> None:
    Image.fromarray(np.array([[0, 5_000, 10_000]], np.uint16)).save(folder / "depth.png")
    write_jsonl(folder, [{"file_name": "depth.png", "caption": "x"}])
    source = ImageFolderSource(ImageFolderConfig(uri=str(folder), white_16_bit=10_000), None)
    (pair,) = source.read(source.plan())
    assert decode_image(expect_pair(pair).input_image)[..., 0].tolist() == [[0, 128, 255]]
