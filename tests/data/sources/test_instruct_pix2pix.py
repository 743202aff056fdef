import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.data.records import ImagePair, image_pairs_table
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig, open_instruct_pix2pix
from prompt_diffusion.data.sources.photos import PhotosConfig, PhotosSource
from prompt_diffusion.data.transforms import decode_image
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import list_files
from prompt_diffusion.store.uris import join_uri
from tests.data.sources.export import write_instruct_pix2pix_folder, write_instruct_pix2pix_parquet

SIZE = 32
TEXTS = ("input_prompt", "edit_instruction", "edited_prompt")


@pytest.fixture(scope="module")
def photos() -> list[ImagePair]:
    """Return nine prompt groups of three pairs."""
    source = PhotosSource(PhotosConfig(crops_per_photo=3), SIZE)
    return [pair for pair in source.read(source.plan()) if isinstance(pair, ImagePair)]


@pytest.fixture
def folder(tmp_path: Path, photos: list[ImagePair]) -> Path:
    write_instruct_pix2pix_folder(photos, str(tmp_path))
    return tmp_path


@pytest.fixture
def rows(tmp_path: Path, photos: list[ImagePair]) -> Path:
    write_instruct_pix2pix_parquet(photos, str(tmp_path), rows_per_file=10)
    return tmp_path / "data"


def read_all(uri: object, num_groups: int | None = None, **options: object) -> tuple[list[ImagePair], list[Reject]]:
    config = InstructPix2PixConfig.model_validate({"uri": str(uri), "num_groups": num_groups, **options})
    source = open_instruct_pix2pix(config, SIZE)
    keys = source.plan()
    found = list(source.read(keys))
    assert [item.sample_id for item in found] == [key.sample_id for key in keys]
    return [i for i in found if isinstance(i, ImagePair)], [i for i in found if isinstance(i, Reject)]


def compute_difference(one: bytes, other: bytes) -> float:
    return float(np.abs(decode_image(one).astype(int) - decode_image(other).astype(int)).mean())


def digest(uri: object) -> str:
    return open_instruct_pix2pix(InstructPix2PixConfig(uri=str(uri)), SIZE).digest()


def test_the_folder_form_round_trips(store_root: str, photos: list[ImagePair]) -> None:
    write_instruct_pix2pix_folder(photos, store_root)
    pairs, rejects = read_all(store_root)
    assert not rejects
    assert [pair.sample_id for pair in pairs] == [f"{pair.group_id}/{pair.seed}" for pair in photos]
    for pair, photo in zip(pairs, photos, strict=True):
        assert [getattr(pair, name) for name in TEXTS] == [getattr(photo, name) for name in TEXTS]
        assert (pair.group_id, pair.seed) == (photo.group_id, photo.seed)
        assert compute_difference(pair.input_image, photo.input_image) < 4.0  # JPEG
        assert compute_difference(pair.edited_image, photo.edited_image) < 4.0


def test_the_parquet_form_round_trips(store_root: str, photos: list[ImagePair]) -> None:
    write_instruct_pix2pix_parquet(photos, store_root, rows_per_file=10)
    assert list_files(store_root) == [f"data/train-{index:05d}.parquet" for index in range(3)]
    pairs, rejects = read_all(store_root)
    assert not rejects
    assert pairs[10].sample_id == "data/train-00001.parquet#0"
    for pair, photo in zip(pairs, photos, strict=True):
        assert [getattr(pair, name) for name in TEXTS] == [getattr(photo, name) for name in TEXTS]
        assert (pair.input_image, pair.edited_image) == (photo.input_image, photo.edited_image)
        assert pair.seed == photo.seed
    for name in ("group_id", "edited_prompt"):
        assert len({getattr(pair, name) for pair in pairs}) == 9


def test_the_parquet_form_has_the_columns_of_the_public_data(rows: Path) -> None:
    schema = pq.read_schema(rows / "train-00000.parquet")
    images = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert {field.name: field.type for field in schema} == {
        "original_prompt": pa.string(),
        "original_image": images,
        "edit_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "edited_image": images,
    }


def test_rows_in_the_middle_of_a_file_are_the_same_alone(rows: Path) -> None:
    source = open_instruct_pix2pix(InstructPix2PixConfig(uri=str(rows)), SIZE)
    keys = source.plan()
    everything = list(source.read(keys))
    assert list(source.read(keys[8:13])) == everything[8:13]


def test_the_parquet_form_is_read_a_few_rows_at_a_time(tmp_path: Path, photos: list[ImagePair]) -> None:
    """A file of one large row group is read with a small part of it in memory."""
    rng = np.random.default_rng(0)
    padded = [dataclasses.replace(photo, input_image=photo.input_image + rng.bytes(600_000)) for photo in photos * 3]
    write_instruct_pix2pix_parquet(padded, str(tmp_path), rows_per_file=1000)
    (name,) = list_files(str(tmp_path))
    group = pq.ParquetFile(tmp_path / name).metadata.row_group(0)
    assert (group.num_rows, group.total_byte_size > 40e6) == (len(padded), True)
    before = pa.total_allocated_bytes()
    peak, num_read = 0, 0
    source = open_instruct_pix2pix(InstructPix2PixConfig(uri=str(tmp_path)), SIZE)
    for item in source.read(source.plan()):
        peak, num_read = max(peak, pa.total_allocated_bytes() - before), num_read + isinstance(item, ImagePair)
    assert num_read == len(padded)
    assert peak < 0.4 * group.total_byte_size, peak


def test_the_first_groups_alone_can_be_taken(folder: Path, tmp_path: Path, photos: list[ImagePair]) -> None:
    write_instruct_pix2pix_parquet(photos, str(tmp_path / "rows"), rows_per_file=10)
    for uri in (folder, tmp_path / "rows"):
        pairs, _ = read_all(uri, num_groups=2)
        assert len(pairs) == 6
        assert len({pair.group_id for pair in pairs}) == 2


def test_the_digest_depends_on_the_content_and_not_on_the_place(tmp_path: Path, photos: list[ImagePair]) -> None:
    for name, pairs in (("a", photos), ("b", photos), ("c", photos[:-1])):
        write_instruct_pix2pix_folder(pairs, str(tmp_path / "folder" / name))
        write_instruct_pix2pix_parquet(pairs, str(tmp_path / "rows" / name), 10)
    for form in ("folder", "rows"):
        first, copy, shorter = (digest(tmp_path / form / name) for name in "abc")
        assert first == copy
        assert first != shorter


def test_a_replaced_image_moves_the_digest(folder: Path) -> None:
    before = digest(folder)
    (folder / "chelsea" / "1_1.jpg").write_bytes(b"another")
    assert digest(folder) != before


def test_seeds_may_be_numbers(folder: Path) -> None:
    seeds = json.loads((folder / "seeds.json").read_text())
    (folder / "seeds.json").write_text(json.dumps([[group, [int(seed) for seed in of]] for group, of in seeds]))
    pairs, rejects = read_all(folder)
    assert (len(pairs), len(rejects)) == (27, 0)


BROKEN_PROMPTS = [
    (b"{", "chelsea/prompt.json is not JSON"),
    (b"\xff\xfe\xfa", "chelsea/prompt.json is not JSON"),
    (b"[]", "chelsea/prompt.json holds a list, not an object"),
    (b'{"input": "a cat", "edit": "x"}', "the caption is missing: output"),
    (b'{"input": " ", "edit": "x", "output": "a dog"}', "the caption is missing: input"),
    (b'{"input": "a cat", "edit": "x", "output": 3}', "output is a int, not a text"),
    (b'{"input": "a \\ud83d", "edit": "x", "output": "y"}', "input is not Unicode: it has half of a surrogate pair"),
    (b'{"input": "a", "edit": "\\udc00", "output": "y"}', "edit is not Unicode: it has half of a surrogate pair"),
    (b'{"input": "caf\xe9"}', "chelsea/prompt.json is not JSON: line 1 is not UTF-8"),
    (b"[" * 100_000, "chelsea/prompt.json is not JSON"),
    (b'{"input": ' + b"9" * 5_000 + b"}", "chelsea/prompt.json is not JSON"),
    (None, "chelsea/prompt.json is missing"),
]


@pytest.mark.parametrize(("content", "reason"), BROKEN_PROMPTS)
def test_a_broken_prompt_rejects_its_group_with_the_reason(folder: Path, content: bytes | None, reason: str) -> None:
    if content is None:
        (folder / "chelsea" / "prompt.json").unlink()
    else:
        (folder / "chelsea" / "prompt.json").write_bytes(content)
    pairs, rejects = read_all(folder)
    assert len(pairs) == 24
    assert [reject.sample_id for reject in rejects] == ["chelsea/0", "chelsea/1", "chelsea/2"]
    assert all(reject.reason.startswith(reason) for reject in rejects)


def test_a_truncated_or_missing_image_rejects_its_pair_alone(folder: Path) -> None:
    image = folder / "chelsea" / "1_0.jpg"
    image.write_bytes(image.read_bytes()[:200])
    (folder / "coffee" / "2_1.jpg").unlink()
    pairs, rejects = read_all(folder)
    assert len(pairs) == 25
    assert [reject.sample_id for reject in rejects] == ["chelsea/1", "coffee/2"]
    assert rejects[0].reason.startswith("chelsea/1_0.jpg: the image cannot be decoded")
    assert rejects[1].reason == "coffee/2_1.jpg is missing"


@pytest.mark.parametrize("content", ["{", '{"a": ["1"]}', '[["a", "1"]]', '[["a", ["x"]]]', "[" * 100_000])
def test_a_broken_seeds_file_is_refused_in_one_sentence(folder: Path, content: str) -> None:
    (folder / "seeds.json").write_text(content)
    with pytest.raises(ValueError, match=r"seeds\.json"):
        read_all(folder)


def test_a_folder_that_is_neither_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a seeds\.json nor a Parquet file"):
        open_instruct_pix2pix(InstructPix2PixConfig(uri=str(tmp_path)), SIZE)


def rewrite(file: Path, column: str, row: int, value: object) -> None:
    table = pq.read_table(file)
    values = table.column(column).to_pylist()
    values[row] = value
    place = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type)), file
    )


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("edited_prompt", None, "the caption is missing: edited_prompt"),
        ("original_prompt", "", "the caption is missing: original_prompt"),
        ("edited_image", None, "edited_image is missing"),
        ("original_image", {"bytes": None, "path": "x.jpg"}, "original_image is missing"),
        ("original_image", {"bytes": b"GIF89a", "path": None}, "original_image: the image cannot be decoded"),
    ],
)
def test_a_broken_row_is_rejected_alone(rows: Path, column: str, value: object, reason: str) -> None:
    rewrite(rows / "train-00001.parquet", column, 4, value)
    pairs, rejects = read_all(rows)
    assert len(pairs) == 26
    assert [reject.sample_id for reject in rejects] == ["train-00001.parquet#4"]
    assert rejects[0].reason.startswith(reason)


def test_an_unreadable_parquet_file_counts_as_the_rows_it_would_hold(rows: Path) -> None:
    file = rows / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    pairs, rejects = read_all(rows)
    assert len(pairs) == 17
    assert 6 <= len(rejects) <= 16
    assert all("train-00001.parquet is not a readable Parquet file" in reject.reason for reject in rejects)


def test_a_damaged_page_rejects_the_rows_of_its_row_group(rows: Path, photos: list[ImagePair]) -> None:
    file = rows / "train-00000.parquet"
    sink = pq.ParquetWriter(file, (table := pq.read_table(file)).schema, write_page_checksum=True)
    for start in (0, 4, 8):
        sink.write_table(table.slice(start, 4))
    sink.close()
    column = pq.ParquetFile(file).metadata.row_group(1).column(1)  # the bytes of the original image
    data = bytearray(file.read_bytes())
    middle = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    data[middle] ^= 0xFF
    file.write_bytes(data)
    pairs, rejects = read_all(rows)
    assert len(pairs) == 23
    assert [reject.sample_id for reject in rejects] == [f"train-00000.parquet#{row}" for row in range(4, 8)]
    assert all(reject.reason.startswith("row group 1 of train-00000.parquet cannot be read") for reject in rejects)


def test_another_table_is_refused_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has no columns original_prompt, .*; it has text"):
        read_all(tmp_path)


def test_a_failing_store_is_not_a_reject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        raise ConnectionResetError(f"no connection to {uri}")

    source = open_instruct_pix2pix(InstructPix2PixConfig(uri=str(folder)), SIZE)
    keys = source.plan()
    monkeypatch.setattr("prompt_diffusion.data.sources.base.read_bytes", fail)
    with pytest.raises(ConnectionResetError):
        list(source.read(keys))


def test_a_group_with_two_texts_cannot_be_written_as_a_folder(tmp_path: Path, photos: list[ImagePair]) -> None:
    other = dataclasses.replace(photos[1], edited_prompt="something else")
    with pytest.raises(ValueError, match="prompt group 'astronaut' has two texts"):
        write_instruct_pix2pix_folder([photos[0], other], join_uri(str(tmp_path), "x"))


def test_a_byte_order_mark_is_no_part_of_the_texts(folder: Path) -> None:
    for name in ("seeds.json", "chelsea/prompt.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    pairs, rejects = read_all(folder)
    assert (len(pairs), len(rejects)) == (27, 0)


@pytest.mark.parametrize("seed", [2**63, str(2**63), -(2**63) - 1, 10**30])
def test_a_seed_beyond_64_bits_is_a_reject(folder: Path, seed: int | str) -> None:
    seeds = json.loads((folder / "seeds.json").read_text())
    (folder / "seeds.json").write_text(json.dumps([*seeds, ["chelsea", [seed, 2**63 - 1]]]))
    pairs, rejects = read_all(folder)
    assert rejects[0] == Reject(sample_id=f"chelsea/{seed}", reason=f"the seed {seed} is larger than 64 bits hold")
    assert rejects[1].reason == f"chelsea/{2**63 - 1}_0.jpg is missing"
    image_pairs_table(pairs)


def test_half_of_a_surrogate_pair_in_a_group_is_a_reject(folder: Path) -> None:
    seeds = json.loads((folder / "seeds.json").read_text())
    (folder / "seeds.json").write_text(json.dumps([*seeds, ["half \ud83d", ["1"]]]))
    pairs, (reject,) = read_all(folder)
    assert len(pairs) == 27
    assert reject.sample_id == "half \\ud83d/1"
    assert "is no file name" in reject.reason
    reject.model_dump_json()


def test_a_pair_that_is_listed_twice_is_told_by_its_entries(folder: Path) -> None:
    seeds = json.loads((folder / "seeds.json").read_text())
    (folder / "seeds.json").write_text(json.dumps([*seeds, [seeds[1][0], seeds[1][1][:1]]]))
    pairs, (reject,) = read_all(folder)
    assert len(pairs) == 27
    assert reject.reason == "it is listed twice in seeds.json: in entry 2 and in entry 10"


def test_a_folder_that_does_not_exist_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^there is no folder {tmp_path}/none$"):
        read_all(tmp_path / "none")
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: name the folder that it lies in"):
        read_all(tmp_path / "x.parquet")


def retype(file: Path, column: str, values: pa.Array) -> None:
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, values), file)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_image_columns_of_plain_bytes_are_read(rows: Path, kind: pa.DataType) -> None:
    for file in rows.iterdir():
        images = [value["bytes"] for value in pq.read_table(file)["original_image"].to_pylist()]
        retype(file, "original_image", pa.array(images, kind))
    pairs, rejects = read_all(rows)
    assert (len(pairs), len(rejects)) == (27, 0)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("images/0.jpg", "string"),
        ([1, 2], "list<element: int64>"),
        ({"path": "x.jpg"}, "struct<path: string>"),
        (7, "int64"),
    ],
)
def test_image_columns_that_hold_no_pictures_are_refused_before_the_first_shard(
    rows: Path, value: object, kind: str
) -> None:
    retype(rows / "train-00001.parquet", "edited_image", pa.array([value] * 10))
    with pytest.raises(
        ValueError, match=rf"the column 'edited_image' of .*train-00001\.parquet holds {kind}, not pictures"
    ):
        read_all(rows)


def test_an_image_column_of_nothing_rejects_its_rows(rows: Path) -> None:
    retype(rows / "train-00001.parquet", "edited_image", pa.nulls(10))
    pairs, rejects = read_all(rows)
    assert (len(pairs), {reject.reason for reject in rejects}) == (17, {"edited_image is missing"})


def test_a_prompt_that_is_not_utf_8_rejects_its_row(rows: Path) -> None:
    texts = [b"fine"] * 9 + [b"caf\xe9"]
    retype(rows / "train-00001.parquet", "edited_prompt", pa.array(texts, pa.binary()).view(pa.string()))
    pairs, (reject,) = read_all(rows)
    assert len(pairs) == 26
    assert reject.sample_id == "train-00001.parquet#9"
    assert reject.reason.startswith("edited_prompt is not UTF-8")


def test_prompts_as_bytes_are_the_same_texts(rows: Path, photos: list[ImagePair]) -> None:
    before = [pair.group_id for pair in read_all(rows)[0]]
    for file in rows.iterdir():
        texts = pq.read_table(file)["original_prompt"].to_pylist()
        retype(file, "original_prompt", pa.array([text.encode() for text in texts], pa.binary()))
    pairs, rejects = read_all(rows)
    assert not rejects
    assert [pair.group_id for pair in pairs] == before
    assert [pair.input_prompt for pair in pairs] == [photo.input_prompt for photo in photos]


def test_columns_of_other_names_are_taken(rows: Path) -> None:
    for file in rows.iterdir():
        table = pq.read_table(file)
        pq.write_table(table.rename_columns({"original_image": "image", "edited_prompt": "text"}), file)
    with pytest.raises(ValueError, match=r"has no columns .*say which they are with ingest\.source\.columns"):
        read_all(rows)
    pairs, _ = read_all(rows, columns={"original_image": "image", "edited_prompt": "text"})
    assert len(pairs) == 27
    with pytest.raises(ValueError, match=r"ingest\.source\.columns names image; there are original_prompt"):
        read_all(rows, columns={"image": "original_image"})


def rename_splits(rows: Path, *names: str) -> None:
    for file, name in zip(sorted(rows.iterdir()), names, strict=True):
        (rows / name).parent.mkdir(exist_ok=True)
        file.rename(rows / name)


PUBLISHED = ("test-00000-of-00001.parquet", "train-00000-of-00001.parquet", "val-00000.parquet")


@pytest.mark.parametrize(
    "names",
    [
        PUBLISHED,
        ("test/0.parquet", "train/0.parquet", "validation/0.parquet"),
        ("eval_0.parquet", "0.parquet", "dev.parquet"),
    ],
)
def test_published_splits_are_kept_and_training_comes_first(rows: Path, names: tuple[str, ...]) -> None:
    rename_splits(rows, *names)
    keys = open_instruct_pix2pix(InstructPix2PixConfig(uri=str(rows)), SIZE).plan()
    assert [key.published for key in keys] == ["train"] * 10 + ["validation"] * 7 + ["test"] * 10
    assert [key.file for key in keys[:1]] == [names[1]]


def test_published_splits_can_be_ignored(rows: Path) -> None:
    rename_splits(rows, *PUBLISHED)
    config = InstructPix2PixConfig(uri=str(rows), published_splits="ignore")
    keys = open_instruct_pix2pix(config, SIZE).plan()
    assert {key.published for key in keys} == {None}
    assert keys[0].file == PUBLISHED[1]


def test_training_files_alone_publish_no_split(rows: Path) -> None:
    assert {key.published for key in open_instruct_pix2pix(InstructPix2PixConfig(uri=str(rows)), SIZE).plan()} == {None}


def test_the_first_groups_are_those_of_each_published_split(rows: Path) -> None:
    rename_splits(rows, *PUBLISHED)
    keys = open_instruct_pix2pix(InstructPix2PixConfig(uri=str(rows), num_groups=1), SIZE).plan()
    groups = {key.published: {other.group_id for other in keys if other.published == key.published} for key in keys}
    assert {split: len(found) for split, found in groups.items()} == {"train": 1, "validation": 1, "test": 1}
