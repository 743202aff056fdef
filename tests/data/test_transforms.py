import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from prompt_diffusion.data import transforms
from prompt_diffusion.data.transforms import decode_image, encode_png, from_model_range, resize_image, to_model_range


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def make_palette() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return encode(image)


def make_transparent_palette() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return encode(image, transparency=1)


def make_alpha(mode: str, pixels: list[tuple[int, ...]]) -> bytes:
    image = Image.new(mode, (2, 1))
    image.putdata(pixels)
    return encode(image)


def make_16_bit(values: list[int]) -> bytes:
    return encode(Image.fromarray(np.array([values], dtype=np.uint16)))


def make_16_bit_rgb() -> bytes:
    """A PNG of two pixels with 16 bits a channel, written by hand: Pillow reads such files but writes none."""
    row = b"\0" + struct.pack(">6H", 0xFF00, 0x8000, 0x0000, 0x1234, 0xFFFF, 0x00FF)
    chunks = [(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode(Image.fromarray(np.array([[0, 128]], np.uint8))), [[0] * 3, [128] * 3], id="grey"),
        pytest.param(encode(Image.new("1", (2, 1), 1)), [[255] * 3, [255] * 3], id="bilevel"),
        pytest.param(make_palette(), [[10, 20, 30], [200, 100, 50]], id="palette"),
        pytest.param(make_transparent_palette(), [[10, 20, 30], [255, 255, 255]], id="transparent palette"),
        pytest.param(
            make_alpha("RGBA", [(10, 20, 30, 0), (200, 100, 50, 128)]), [[255] * 3, [227, 177, 152]], id="alpha"
        ),
        pytest.param(make_alpha("LA", [(100, 255), (0, 0)]), [[100] * 3, [255] * 3], id="grey with alpha"),
        pytest.param(
            encode(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [[255, 0, 0], [255, 0, 0]], id="CMYK"
        ),
        pytest.param(make_16_bit([257 * 7, 65535]), [[7] * 3, [255] * 3], id="16 bit grey"),
        pytest.param(make_16_bit_rgb(), [[255, 128, 0], [18, 255, 0]], id="16 bit RGB"),
    ],
)
def test_every_image_mode_becomes_rgb(data: bytes, expected: list[list[int]]) -> None:
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.tolist() == [expected]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, [[1, 2], [3, 4]]), (3, [[4, 3], [2, 1]]), (6, [[3, 1], [4, 2]]), (8, [[2, 4], [1, 3]]), (2, [[2, 1], [4, 3]])],
)
def test_an_image_is_turned_as_its_exif_says(orientation: int, expected: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8)), exif=exif)
    assert decode_image(data)[:, :, 0].tolist() == expected


def test_png_round_trip_is_lossless_and_deterministic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_png(image)), image)
    assert encode_png(image) == encode_png(image.copy())


def test_encoding_refuses_what_is_no_rgb_image() -> None:
    with pytest.raises(ValueError, match=r"float32 \(4, 4, 3\)"):
        encode_png(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]


def make_noise(file_format: str) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), file_format)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_refused(file_format: str) -> None:
    data = make_noise(file_format)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_a_damaged_image_gives_pixels_or_a_value_error_only(file_format: str) -> None:
    data = make_noise(file_format)
    rng = random.Random(file_format)
    reasons = []
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(min(len(damaged), rng.choice([40, 400, 10**9])))] = rng.randrange(256)
        try:
            assert decode_image(bytes(damaged)).shape[2] == 3
        except ValueError as error:
            reasons.append(str(error))
    assert reasons
    assert not any("\n" in reason for reason in reasons)


def test_a_reason_does_not_change_from_run_to_run() -> None:
    with pytest.raises(ValueError, match=r"^the image cannot be decoded: not an image file$"):
        decode_image(b"<html>404 Not Found</html>")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="the image is empty"):
        decode_image(b"")


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    with pytest.raises(ValueError, match="2 frames"):
        decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_a_photograph_with_an_embedded_preview_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [254, 0, 0]


def test_an_oversized_image_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_png(np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(transforms, "MAX_PIXELS", 99)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="10 x 10 pixels, more than 99"):
        decode_image(data)


def test_a_decompression_bomb_is_refused() -> None:
    size = 30_000
    header = struct.pack(">2I5B", size, size, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ValueError, match="pixels"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(encode(Image.new("F", (2, 2)), "TIFF"))


def test_resize_takes_the_centre_square() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200
    assert (resize_image(image, 2) == 200).all()
    assert (resize_image(image, 4) == 200).all()


def test_resize_is_one_lanczos() -> None:
    image = np.random.default_rng(2).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(resize_image(image, 32), expected)


def test_model_range_is_minus_one_to_one_and_inverts() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    values = to_model_range(images)
    assert values.shape == (1, 3, 16, 16)
    assert (values.min().item(), values.max().item()) == (-1.0, 1.0)
    assert torch.equal(values[0, :, 0, 1], torch.full((3,), 1 / 127.5 - 1.0))
    assert np.array_equal(from_model_range(values), images)
    assert from_model_range(torch.tensor([[[[-3.0]], [[3.0]], [[0.0]]]])).tolist() == [[[[0, 255, 128]]]]
