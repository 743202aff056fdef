import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from prompt_diffusion.evaluation import features
from prompt_diffusion.evaluation.features import (
    INCEPTION_FILE,
    ExtractorName,
    Inception,
    build_extractor,
    resolve_extractor,
)


def read_photo(name: str, side: int) -> np.ndarray:
    photo = Image.fromarray(getattr(data, name)())
    square = min(photo.size)
    return np.asarray(photo.crop((0, 0, square, square)).resize((side, side), Image.Resampling.LANCZOS))


def test_features_are_the_same_in_every_batch() -> None:
    extractor = build_extractor("efficientnet_lite0")
    images = np.stack([read_photo(name, 64) for name in ("chelsea", "coffee", "astronaut", "rocket", "chelsea")])
    together = extractor.extract(images)
    assert together.shape == (5, extractor.dimensions)
    assert together.dtype == np.float64
    np.testing.assert_allclose(extractor.extract(images[2:3])[0], together[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(extractor.extract(images), together)
    np.testing.assert_allclose(together[0], together[4], rtol=1e-4, atol=1e-4)


def test_efficientnet_sees_what_a_photo_shows() -> None:
    """The weights, the channel order and the scaling are right if a cup of espresso is classified as one."""
    extractor = build_extractor("efficientnet_lite0")
    assert isinstance(extractor, features.EfficientNetLite0)
    pooled = extractor.extract(read_photo("coffee", 224)[None])
    head = extractor.network._fc
    scores = pooled @ head.weight.double().numpy().T + head.bias.double().numpy()  # type: ignore[union-attr, operator]
    assert scores.argmax() == 967  # espresso, of ImageNet's thousand


def test_weights_with_another_digest_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "WEIGHT_DIGESTS", {"efficientnet_lite0": "0" * 64})
    build_extractor.cache_clear()
    try:
        with pytest.raises(ValueError, match="not the pinned 0000"):
            build_extractor("efficientnet_lite0")
    finally:
        build_extractor.cache_clear()


def test_inception_weights_with_another_digest_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / INCEPTION_FILE).write_bytes(b"not a network")
    with pytest.raises(ValueError, match="sha256"):
        build_extractor("inception", tmp_path)


def test_inception_without_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a folder"):
        build_extractor("inception")


def test_auto_says_what_it_chose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert resolve_extractor("auto", tmp_path) == "efficientnet_lite0"
        (tmp_path / INCEPTION_FILE).write_bytes(b"")
        assert resolve_extractor("auto", tmp_path) == "inception"
    assert ["efficientnet_lite0" in caplog.messages[0], "inception" in caplog.messages[1]] == [True, True]


def test_an_explicit_choice_is_kept(tmp_path: Path) -> None:
    assert resolve_extractor("inception", tmp_path) == "inception"
    assert resolve_extractor("efficientnet_lite0", tmp_path) == "efficientnet_lite0"


@pytest.mark.parametrize(("name", "side"), [("inception", 299), ("inception_legacy", 24)])
def test_the_legacy_extractor_leaves_the_resizing_to_the_network(name: ExtractorName, side: int) -> None:
    class Means(torch.nn.Module):
        """Stands where the weights would be: what reaches the network is what is tested."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert (images.shape[1:], images.dtype) == ((3, side, side), torch.float32)
            return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 2048)

    images = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    features = Inception(Means(), name=name).extract(images)
    assert features.shape == (5, 2048)
    assert np.allclose(features[:, 0], images.mean(axis=(1, 2, 3)), atol=2.0)
