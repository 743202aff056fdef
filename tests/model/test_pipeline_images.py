"""Images in: any kind, mode and size becomes what training sees of the same picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prompt_diffusion.data.transforms import decode_image, resize_image, to_model_range
from prompt_diffusion.model.conditions import read_conditions
from prompt_diffusion.model.images import fit_picture, read_images, stack_pictures


def see(images, **size):
    """Return what the query stem reads, at the pictures' own size where none is given."""
    rows, columns, _ = read_images(images, "query")[0].shape
    return read_conditions(images, None, size.get("height", rows), size.get("width", columns), 4).queries


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)


def test_every_kind_of_the_same_picture_is_the_same(pixels):
    expected = to_model_range(pixels)
    floats = pixels.astype(np.float32) / 255
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(see(pixels), expected)
    assert torch.equal(see([Image.fromarray(each) for each in pixels]), expected)
    assert torch.equal(see(list(pixels)), expected)
    assert torch.equal(see(tensor), expected)
    assert torch.equal(see(pixels.astype(np.uint16) * 257), expected)
    for kind in (floats, floats.astype(np.float64), tensor / 255, list(tensor / 255), [floats[0], pixels[1]]):
        torch.testing.assert_close(see(kind), expected, rtol=0, atol=1e-6)
    assert torch.equal(see(Image.fromarray(pixels[0])), expected[:1])
    assert torch.equal(see(pixels[0]), expected[:1])
    assert torch.equal(see(tensor[0]), expected[:1])
    black_to_white = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    assert (see(black_to_white)[0].unique(), see(black_to_white)[1].unique()) == (torch.tensor([-1]), torch.tensor([1]))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_is_read_as_its_file_is(pixels, mode):
    image = Image.fromarray(pixels[0])
    if mode == "I;16":
        image = Image.fromarray(pixels[0, ..., 0].astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels[1, ..., 0]))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, format="TIFF" if mode == "CMYK" else "PNG")
    expected = decode_image(file.getvalue())
    np.testing.assert_array_equal(read_images(image, "query")[0], expected)


def test_grey_and_alpha_arrays_are_read_as_pictures_are(pixels):
    grey, alpha = pixels[0, ..., 0], pixels[1, ..., :1]
    repeated = np.repeat(grey[..., None], 3, axis=2)
    for array in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        np.testing.assert_array_equal(read_images(array, "query")[0], repeated)
    np.testing.assert_allclose(read_images(grey / 255.0, "query")[0], repeated / 255.0, atol=1e-6)
    over_white = np.concatenate([pixels[0], alpha], axis=2)
    expected = read_images(Image.fromarray(over_white, "RGBA"), "query")[0]
    np.testing.assert_array_equal(read_images(over_white, "query")[0], expected)
    np.testing.assert_allclose(read_images(over_white / 255.0, "query")[0], expected / 255.0, atol=1 / 255)
    opaque = np.concatenate([pixels[0], np.full_like(alpha, 255)], axis=2)
    np.testing.assert_array_equal(read_images(opaque, "query")[0], pixels[0])
    clear = np.concatenate([pixels[0], np.zeros_like(alpha)], axis=2)
    assert read_images(clear, "query")[0].min() == 255


def test_a_size_is_met_by_one_centred_cut_and_one_resize(pixels):
    np.testing.assert_array_equal(fit_picture(pixels[0], 16, 16), resize_image(pixels[0], 16))
    picture = pixels[0]
    assert fit_picture(picture, 32, 48) is picture
    cut = pixels[0][:, 8:40]  # the centre of the wanted aspect, at the wanted size
    np.testing.assert_array_equal(fit_picture(pixels[0], 32, 32), cut)
    assert fit_picture(pixels[0], 64, 24).shape == (64, 24, 3)
    unit = fit_picture((pixels[0] / 255).astype(np.float32), 20, 20)
    assert (unit.dtype, unit.min() >= 0, unit.max() <= 1) == (np.float32, True, True)
    # 8-bit pictures are clipped between rows and columns, too
    assert np.abs(unit - fit_picture(pixels[0], 20, 20) / 255).mean() < 1 / 255
    assert see(pixels, height=16).shape == (2, 3, 16, 48)
    mixed = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1][:, :32])]
    assert see(mixed, height=24, width=24).shape == (2, 3, 24, 24)


def test_a_pair_comes_to_the_size_of_the_output(pixels):
    large = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    conditions = read_conditions(pixels[:1], (large, Image.fromarray(large)), 32, 48, 4)
    (pair,) = conditions.example_pairs
    expected = stack_pictures([fit_picture(large, 32, 48)])
    assert torch.equal(pair, torch.cat([expected, expected], dim=1))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (7, "query: an image is PIL, a path, an array, a tensor, or a list of them, got int"),
        ("photo.png", "query: there is no image file photo.png"),
        (np.zeros((2, 32, 32, 5), np.uint8), r"arrays are H, W, C or N, H, W, C .* got \(32, 32, 5\)"),
        (np.zeros((0, 32, 3), np.uint8), r"got \(0, 32, 3\)"),
        (torch.zeros(2, 32, 32, 3), r"tensors are C, H, W or N, C, H, W with 1, 3 or 4 channels, got \(32, 32, 3\)"),
        (torch.zeros(32, 32), r"tensors are C, H, W .* got \(32, 32\)"),
        (np.zeros((32, 32, 3), np.int64), "uint8, uint16, or floats in .* got int64"),
        (np.full((32, 32, 3), 200.0), "floats are in .* got values from 200 to 200: scale them, or give uint8"),
        (np.full((32, 32, 3), -0.5), "got values from -0.5 to -0.5"),
        (torch.full((3, 32, 32), float("nan")), "got values from nan to nan"),
        (Image.new("F", (32, 32)), "query: the image has floating-point pixels"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(images, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        see(images)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_named(tmp_path, pixels):
    Image.fromarray(pixels[0]).save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    with Image.open(tmp_path / "short.png") as image, pytest.raises(ValueError, match=r"example source: .*truncated"):
        read_conditions(pixels[0], (image, pixels[0]), 32, 48, 4)
