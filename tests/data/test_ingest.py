import io
import json
import os
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from prompt_diffusion.data.ingest import Ingest, IngestConfig, assign_splits
from prompt_diffusion.data.records import IMAGE_PAIR_SCHEMA, Split
from prompt_diffusion.data.sources.base import SampleKey
from prompt_diffusion.data.sources.photos import PhotosConfig, PhotosSource
from prompt_diffusion.store import retries
from prompt_diffusion.store.manifest import find_sealed, open_manifest
from prompt_diffusion.store.records import ShardProgress
from prompt_diffusion.store.retries import StoreError
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.store.storage import list_sizes, write_bytes
from prompt_diffusion.store.uris import join_uri
from tests.data.sources.export import write_instruct_pix2pix_folder, write_instruct_pix2pix_parquet
from tests.store.fault_proxy import serve_fault_proxy

FRACTIONS = (0.90, 0.05, 0.05)


def make_config(**changes: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": make_scenes(), "image_size": 16, "shard_rows": 15, **changes})


def make_scenes(**changes: int) -> dict[str, Any]:
    return {"kind": "scenes", "num_groups": 20, "pairs_per_group": 2, **changes}


def make_folder_config(uri: object, **changes: object) -> IngestConfig:
    source = {"kind": "instruct_pix2pix", "uri": str(uri)}
    return IngestConfig.model_validate({"source": source, "image_size": 16, "shard_rows": 10, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder form of nine prompt groups with four pairs each."""
    source = PhotosSource(PhotosConfig(crops_per_photo=4), 16)
    write_instruct_pix2pix_folder([p for p in source.read(source.plan()) if hasattr(p, "seed")], str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_source_is_ingested_in_its_order_into_sealed_shards(store_root: str) -> None:
    ref = obtain(Ingest(make_config()), Context(store_root, None))
    manifest = open_manifest(ref.uri)
    table = manifest.read_table()
    assert table.schema.equals(IMAGE_PAIR_SCHEMA)
    assert [shard.rows for shard in manifest.shards] == [15, 15, 10]
    assert table.column("sample_id").to_pylist() == [f"{group:06d}-{pair}" for group in range(20) for pair in range(2)]
    assert manifest.counts == {"rows": 40, "rejects": 0}
    splits = table.column("split").to_pylist()
    assert splits == ["train"] * 36 + ["validation"] * 2 + ["test"] * 2
    conditions = [entry["condition"] for entry in table.column("exact_maps").to_pylist()[0]]
    assert conditions == ["depth", "hed", "normal", "seg"]


def test_a_rerun_writes_nothing(tmp_store: str) -> None:
    first = obtain(Ingest(make_config()), Context(tmp_store, None))
    files = {path: path.stat().st_mtime_ns for path in Path(first.uri).iterdir()}
    assert obtain(Ingest(make_config()), Context(tmp_store, None)) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first.uri).iterdir()} == files


def test_a_killed_run_makes_the_missing_shards_only_and_the_same_bytes(tmp_store: str, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(progress: ShardProgress) -> None:
        if progress.num_done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        obtain(Ingest(make_config()), Context(tmp_store, None, kill))
    folder = Path(Ingest(make_config()).identity.uri(tmp_store))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(before) == ["shard-00000.parquet", "shard-00001.parquet"]
    ref = obtain(Ingest(make_config()), Context(tmp_store, None))
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    other = obtain(Ingest(make_config()), Context(str(tmp_path / "other"), None))
    assert open_manifest(ref.uri).files == open_manifest(other.uri).files


CHANGES: list[dict[str, Any]] = [
    {"image_size": 32},
    {"split_fractions": (0.8, 0.1, 0.1)},
    {"shard_rows": 16},
    {"source": make_scenes(seed=1)},
    {"source": make_scenes(num_groups=21)},
    {"source": make_scenes(pairs_per_group=1)},
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_scientific_field_moves_the_identity(change: dict[str, Any]) -> None:
    assert Ingest(make_config(**change)).identity.fingerprint != Ingest(make_config()).identity.fingerprint


def test_every_field_but_the_budget_is_tried() -> None:
    assert set(IngestConfig.model_fields) == {key for change in CHANGES for key in change} | {"reject_budget"}


@pytest.mark.parametrize("change", [{"crops_per_photo": 3}, {"seed": 1}])
def test_every_field_of_the_photos_moves_the_identity(change: dict[str, int]) -> None:
    plain = IngestConfig(source=PhotosConfig())
    assert Ingest(plain).identity != Ingest(IngestConfig(source=PhotosConfig.model_validate(change))).identity


def test_the_reject_budget_does_not_move_the_identity() -> None:
    assert Ingest(make_config(reject_budget=0.5)).identity == Ingest(make_config()).identity


def test_no_uri_moves_the_identity_and_none_enters_the_shards(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    folder_copy = copy / "data"
    for name in list_sizes(str(folder)):
        (folder_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (folder_copy / name).write_bytes((folder / name).read_bytes())
    first, second = (make_folder_config(uri) for uri in (folder, folder_copy))
    assert Ingest(first).identity == Ingest(second).identity
    refs = [
        obtain(Ingest(config), Context(str(tmp_path / f"store{place}"), None))
        for place, config in enumerate((first, second))
    ]
    assert open_manifest(refs[0].uri).files == open_manifest(refs[1].uri).files
    assert str(tmp_path) not in str(open_manifest(refs[0].uri).read_table(["source_uri", "sample_id"]).to_pylist())


def test_taking_fewer_groups_moves_the_identity(folder: Path) -> None:
    config = make_folder_config(folder)
    fewer = config.model_copy(update={"source": config.source.model_copy(update={"num_groups": 3})})
    assert Ingest(config).identity != Ingest(fewer).identity


def make_keys(groups: list[str]) -> list[SampleKey]:
    return [SampleKey(f"{place}", group, 0) for place, group in enumerate(groups)]


def test_splits_are_by_group_in_source_order() -> None:
    keys = assign_splits(make_keys([f"g{index // 3}" for index in range(300)]), FRACTIONS)
    assert [key.split for key in keys] == ["train"] * 270 + ["validation"] * 15 + ["test"] * 15


def test_no_group_stands_in_two_splits_even_when_its_rows_are_scattered() -> None:
    keys = assign_splits(make_keys([f"g{(index * 7) % 40}" for index in range(200)]), FRACTIONS)
    splits: dict[str, set[str]] = {}
    for key in keys:
        splits.setdefault(key.group_id, set()).add(key.split)
    assert all(len(found) == 1 for found in splits.values())
    assert [key.split for key in keys[:40]] == ["train"] * 36 + ["validation"] * 2 + ["test"] * 2


@pytest.mark.parametrize(
    ("num_groups", "expected"), [(10, (9, 0, 1)), (20, (18, 1, 1)), (100, (90, 5, 5)), (1, (0, 0, 1))]
)
def test_split_sizes_are_the_published_floors(num_groups: int, expected: tuple[int, int, int]) -> None:
    splits = [key.split for key in assign_splits(make_keys([str(g) for g in range(num_groups)]), FRACTIONS)]
    assert tuple(splits.count(name) for name in ("train", "validation", "test")) == expected


@pytest.mark.parametrize("fractions", [(0.9, 0.2, 0.1), (1.1, -0.1, 0.0), (0.9, 0.05)])
def test_impossible_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="split_fractions"):
        make_config(split_fractions=fractions)


def test_an_unknown_source_names_what_there_is() -> None:
    with pytest.raises(ValidationError, match="'scenes', 'photos', 'image_folder', 'instruct_pix2pix'"):
        IngestConfig.model_validate({"source": {"kind": "scene"}})


def damage(folder: Path) -> None:
    """Break a prompt group of four pairs, and one image."""
    (folder / "coffee" / "prompt.json").write_text("{")
    image = folder / "rocket" / "2_1.jpg"
    image.write_bytes(image.read_bytes()[:99])


def test_rejects_are_sealed_with_their_reasons_and_counts_add_up(folder: Path, store_root: str) -> None:
    damage(folder)
    manifest = open_manifest(
        obtain(Ingest(make_folder_config(folder, reject_budget=0.2)), Context(store_root, None)).uri
    )
    assert manifest.counts == {"rows": 31, "rejects": 5}
    assert manifest.read_table().num_rows + len(manifest.rejects) == 36
    reasons = {reject.sample_id: reject.reason for reject in manifest.rejects}
    assert set(reasons) == {*(f"coffee/{seed}" for seed in range(4)), "rocket/2"}
    assert reasons["coffee/3"].startswith("coffee/prompt.json is not JSON")
    assert reasons["rocket/2"].startswith("rocket/2_1.jpg: the image cannot be decoded")


def make_bomb() -> bytes:
    """A whole PNG of 30,000 x 30,000 grey pixels of one bit."""
    packer = zlib.compressobj(1)
    pixels = b"".join([packer.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)] + [packer.flush()])
    header = struct.pack(">2I5B", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def test_images_that_are_not_taken_are_rejected_each_with_its_reason_and_the_rest_is_sealed(
    tmp_path: Path, tmp_store: str
) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(buffer, "PNG")
    whole = buffer.getvalue()
    contents = {
        "good-0.png": whole,
        "bomb.png": make_bomb(),
        "animated.gif": make_animation(),
        "truncated.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "page.jpg": b"<html>404 Not Found</html>",
        "good-1.png": whole,
    }
    source = tmp_path / "images"
    source.mkdir()
    for name, data in contents.items():
        (source / name).write_bytes(data)
    lines = [json.dumps({"file_name": name, "caption": "noise"}) for name in contents]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    config = make_config(source={"kind": "image_folder", "uri": str(source)}, reject_budget=0.9, shard_rows=3)
    manifest = open_manifest(obtain(Ingest(config), Context(tmp_store, None)).uri)
    assert manifest.read_table().column("sample_id").to_pylist() == ["good-0.png", "good-1.png"]
    assert [(reject.sample_id, reject.reason.split(" (")[0]) for reject in manifest.rejects] == [
        ("bomb.png", "bomb.png: the image cannot be decoded: Image size"),
        ("animated.gif", "animated.gif: the image is animated or has pages: 2 frames"),
        ("truncated.png", "truncated.png: the image cannot be decoded: image file is truncated"),
        ("empty.png", "empty.png: the image is empty"),
        ("page.jpg", "page.jpg: the image cannot be decoded: not an image file"),
    ]


@pytest.mark.parametrize("kind", ["folder", "rows"])
def test_a_store_that_fails_while_samples_are_read_rejects_none_of_them(
    folder: Path, s3_store: str, tmp_store: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import s3fs

    data = folder
    if kind == "rows":
        source, data = PhotosSource(PhotosConfig(crops_per_photo=4), 16), folder.with_name("rows")
        write_instruct_pix2pix_parquet([p for p in source.read(source.plan()) if hasattr(p, "seed")], str(data), 7)
    for name in list_sizes(str(data)):
        write_bytes(join_uri(s3_store, name), (data / name).read_bytes())
    config = make_folder_config(s3_store, reject_budget=1.0)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECONDS", 0.002)
    with serve_fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as (proxy, url):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.add_fault("cut", "GET", ".jpg" if kind == "folder" else ".parquet", 10**9)
        with pytest.raises(StoreError, match=f"cannot read {s3_store}/"):
            obtain(Ingest(config), Context(tmp_store, None))
        proxy.heal()
        manifest = open_manifest(obtain(Ingest(config), Context(tmp_store, None)).uri)
        s3fs.S3FileSystem.clear_instance_cache()
    assert manifest.counts == {"rows": 36, "rejects": 0}


def test_rejects_do_not_move_other_samples_between_splits(folder: Path, tmp_path: Path) -> None:
    fractions = (0.6, 0.2, 0.2)
    splits = []
    for place in ("whole", "damaged"):
        config = make_folder_config(folder, reject_budget=0.2, split_fractions=fractions)
        table = open_manifest(obtain(Ingest(config), Context(str(tmp_path / place), None)).uri).read_table(
            ["sample_id", "split"]
        )
        splits.append(dict(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)))
        damage(folder)
    assert len(splits[1]) == 31
    assert splits[1].items() <= splits[0].items()


def test_past_the_budget_the_stage_fails_and_says_which(folder: Path, tmp_store: str) -> None:
    damage(folder)
    config = make_folder_config(folder)
    with pytest.raises(
        ValueError, match=r"ingest rejected 5 of 36 samples.*1\.00%.*coffee/0: coffee/prompt\.json is not"
    ):
        obtain(Ingest(config), Context(tmp_store, None))
    assert find_sealed(Ingest(config).identity, tmp_store) is None


def test_a_shard_of_rejects_alone_is_an_empty_shard(folder: Path, tmp_store: str) -> None:
    for file in (folder / "astronaut").iterdir():
        file.write_bytes(b"")
    config = make_folder_config(folder, shard_rows=4, reject_budget=0.2)
    manifest = open_manifest(obtain(Ingest(config), Context(tmp_store, None)).uri)
    assert manifest.shards[0].rows == 0
    assert manifest.counts == {"rows": 32, "rejects": 4}
    assert manifest.read_table().num_rows == 32


def test_a_sample_that_is_listed_twice_is_taken_once(folder: Path, tmp_store: str) -> None:
    seeds = json.loads((folder / "seeds.json").read_text())
    seeds[0][1].append(seeds[0][1][0])
    (folder / "seeds.json").write_text(json.dumps(seeds))
    manifest = open_manifest(
        obtain(Ingest(make_folder_config(folder, reject_budget=0.1)), Context(tmp_store, None)).uri
    )
    assert [(reject.sample_id, reject.reason) for reject in manifest.rejects] == [
        ("astronaut/0", "it is listed twice in seeds.json: in entry 1 and in entry 1")
    ]
    assert manifest.counts["rows"] == 36


def test_an_empty_source_is_refused(folder: Path, tmp_store: str) -> None:
    (folder / "seeds.json").write_text("[]")
    with pytest.raises(ValueError, match="the source instruct_pix2pix has no samples"):
        obtain(Ingest(make_folder_config(folder)), Context(tmp_store, None))


def test_both_public_forms_hold_the_same_groups_and_splits(folder: Path, tmp_path: Path) -> None:
    source = PhotosSource(PhotosConfig(crops_per_photo=4), 16)
    rows = tmp_path / "rows"
    write_instruct_pix2pix_parquet([p for p in source.read(source.plan()) if hasattr(p, "seed")], str(rows), 7)
    columns = ["input_prompt", "edited_prompt", "seed", "split"]
    tables = [
        open_manifest(obtain(Ingest(make_folder_config(uri)), Context(str(tmp_path / "store"), None)).uri).read_table(
            columns
        )
        for uri in (folder, rows)
    ]
    assert tables[0].num_rows == 36
    assert tables[0].to_pylist() == tables[1].to_pylist()


def make_published(*published: Split | None) -> list[SampleKey]:
    return [
        replace(key, published=split)
        for key, split in zip(make_keys(list(map(str, range(len(published))))), published, strict=True)
    ]


def count_splits(keys: list[SampleKey]) -> dict[str, int]:
    return dict(Counter(key.split for key in keys))


def test_published_splits_stand_and_training_gives_what_is_not_published() -> None:
    keys = assign_splits(make_published(*["train"] * 95, *["test"] * 7), FRACTIONS)
    assert count_splits(keys) == {"train": 90, "validation": 5, "test": 7}
    assert all(key.split == "test" for key in keys[95:])
    keys = assign_splits(make_published(*["train"] * 20, *["validation"] * 3, *["test"] * 2), FRACTIONS)
    assert count_splits(keys) == {"train": 20, "validation": 3, "test": 2}
    assert count_splits(assign_splits(make_published(*["train"] * 20), FRACTIONS)) == {
        "train": 18,
        "validation": 1,
        "test": 1,
    }


def test_a_group_in_two_published_splits_is_refused_with_the_choice_named() -> None:
    one, other = make_published("train", "test")
    with pytest.raises(
        ValueError, match=r"stands in two published splits, train and test.*published_splits to 'ignore'"
    ):
        assign_splits([one, replace(other, group_id=one.group_id)], FRACTIONS)


def test_a_source_that_publishes_nothing_for_training_is_refused_with_the_choice_named() -> None:
    with pytest.raises(ValueError, match=r"no sample is published for training, only for test.*published_splits"):
        assign_splits(make_published("test", "test"), FRACTIONS)


def test_published_test_rows_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    source, rows = PhotosSource(PhotosConfig(crops_per_photo=4), 16), tmp_path / "rows"
    write_instruct_pix2pix_parquet([p for p in source.read(source.plan()) if hasattr(p, "seed")], str(rows), 12)
    for old, new in (("train-00000", "test-00000-of-00001"), ("train-00001", "train-00000-of-00002")):
        (rows / "data" / f"{old}.parquet").rename(rows / "data" / f"{new}.parquet")
    table = open_manifest(
        obtain(Ingest(make_folder_config(rows)), Context(str(tmp_path / "store"), None)).uri
    ).read_table()
    splits = dict(zip(table["sample_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert {split for name, split in splits.items() if "test-" in name} == {"test"}
    assert {split for name, split in splits.items() if "train-" in name} == {"train", "validation"}


def test_repairing_a_reject_and_running_again_works(folder: Path, tmp_store: str) -> None:
    image = folder / "rocket" / "2_1.jpg"
    whole = image.read_bytes()
    image.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="ingest rejected 1 of 36 samples"):
        obtain(Ingest(make_folder_config(folder)), Context(tmp_store, None))
    image.write_bytes(whole)
    assert open_manifest(obtain(Ingest(make_folder_config(folder)), Context(tmp_store, None)).uri).counts == {
        "rows": 36,
        "rejects": 0,
    }
