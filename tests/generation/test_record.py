import io
import zlib

import numpy as np
import pytest
from PIL import Image

from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.generation import SETTINGS_KEY, GenerationRecord, build_request, encode_result, read_record


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def record():
    request = build_request(
        {"model": "models:/x/1", "prompt": "ein grüner Würfel 立方体 \N{SNOWMAN}", "seed": 2**53 - 1}
    )
    return GenerationRecord(request=request, images={"query": "0" * 64}, versions={"torch": "1"})


def test_a_png_keeps_its_pixels_and_its_settings(image, record):
    png = encode_result(image, record)
    np.testing.assert_array_equal(decode_image(png), image)
    assert read_record(png) == record
    grey = np.repeat(image[..., :1], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode_result(grey, record)), grey)


def test_other_programs_find_the_settings_in_a_text_chunk_with_a_valid_checksum(image, record):
    with Image.open(io.BytesIO(encode_result(image, record))) as opened:
        assert opened.text[SETTINGS_KEY].startswith('{"format": 1')
    png = encode_result(image, record)
    start = png.index(b"tEXt")
    length = int.from_bytes(png[start - 4 : start])
    assert int.from_bytes(png[start + 4 + length :][:4]) == zlib.crc32(png[start : start + 4 + length])


def test_an_image_without_settings_is_named(image):
    with pytest.raises(ValueError, match="carries no settings"):
        read_record(encode_png(image))


def test_settings_that_another_version_wrote_are_refused_in_one_sentence(image, record):
    png = encode_result(image, record)
    body = png[png.index(b"tEXt") : png.index(b"IDAT") - 4]
    other = body[:-4].replace(b'"format": 1', b'"format": 9')
    altered = png.replace(body, other + zlib.crc32(other).to_bytes(4))
    with pytest.raises(ValueError, match=r"the settings in the image cannot be read: format: .*1, got 9"):
        read_record(altered)


def test_a_damaged_png_is_refused_as_such(image, record):
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_record(encode_result(image, record)[:-40])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seed": -1}, "seed: .*greater than or equal to 0, got -1"),
        ({"seed": 2**53}, "seed: .*less than"),
        ({"num_inference_steps": 0}, "num_inference_steps: .*greater than or equal to 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .*got nan"),
        ({"scheduler": "euler"}, "scheduler: .*'ddim', 'dpm' or 'unipc', got 'euler'"),
        ({"steps": 3}, "steps: .*not permitted"),
        ({"mode": "edit", "condition": "depth"}, "an edit needs a prompt"),
        ({"condition": "depth"}, "a condition belongs to mode 'edit'"),
    ],
)
def test_a_wrong_field_is_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build_request({"model": "x", **fields})
    assert "\n" not in str(caught.value)
