import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable

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


def make_png(size: tuple[int, int], depth: int, color_type: int, rows: Iterable[bytes], **chunks: bytes) -> bytes:
    """Write a PNG by hand, as the format's specification says: Pillow reads more kinds than it writes.

    Colour types: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA. ``chunks`` stand between header and pixels.
    """
    packer = zlib.compressobj(1)
    pixels = b"".join([packer.compress(b"\0" + row) for row in rows] + [packer.flush()])
    header = struct.pack(">2I5B", *size, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), content) for name, content in chunks.items())]
    parts += [(b"IDAT", pixels), (b"IEND", b"")]
    written = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def pack_16_bit(*values: int) -> list[bytes]:
    """Return one row of 16-bit values."""
    return [struct.pack(f">{len(values)}H", *values)]


def make_cmyk_jpeg(*, has_marker: bool) -> bytes:
    """A JPEG of pure red in CMYK, stored as 255 minus each value as Photoshop does, with or without its APP14 marker."""
    data = encode(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "JPEG", quality=100)
    assert data[2:12] == b"\xff\xee\x00\x0eAdobe\x00"
    return data if has_marker else data[:2] + data[18:]


PALETTE = bytes([10, 20, 30, 200, 100, 50])


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
        pytest.param(make_cmyk_jpeg(has_marker=True), [[255, 0, 0], [255, 0, 0]], id="CMYK of Photoshop"),
        pytest.param(make_cmyk_jpeg(has_marker=False), [[255, 0, 0], [255, 0, 0]], id="CMYK taken for Photoshop's"),
        pytest.param(make_16_bit([257 * 7, 65535]), [[7] * 3, [255] * 3], id="16 bit grey"),
        # 128 of 65535 is just below half a step of 257, 129 just above.
        pytest.param(make_16_bit([128, 129]), [[0] * 3, [1] * 3], id="16 bit grey is rounded"),
        pytest.param(
            make_png((2, 1), 16, 2, pack_16_bit(0xFF00, 0x8000, 0x0000, 0x1234, 0xFFFF, 0x00FF)),
            [[255, 128, 0], [18, 255, 0]],
            id="16 bit RGB",
        ),
        pytest.param(
            make_png((2, 1), 16, 6, pack_16_bit(0xFF00, 0x8000, 0, 0xFFFF, 1, 2, 3, 0)),
            [[255, 128, 0], [255] * 3],
            id="16 bit with alpha",
        ),
        pytest.param(
            make_png((2, 1), 16, 4, pack_16_bit(0x8000, 0xFFFF, 0, 0)),
            [[128] * 3, [255] * 3],
            id="16 bit grey with alpha",
        ),
        pytest.param(
            make_png((2, 1), 16, 0, pack_16_bit(0x8000, 7), tRNS=struct.pack(">H", 7)),
            [[128] * 3, [255] * 3],
            id="16 bit grey with a transparent value",
        ),
        pytest.param(
            make_png((2, 1), 8, 2, [bytes([1, 2, 3, 4, 5, 6])], tRNS=struct.pack(">3H", 1, 2, 3)),
            [[255] * 3, [4, 5, 6]],
            id="RGB with a transparent colour",
        ),
        pytest.param(
            make_png((2, 1), 8, 0, [bytes([9, 200])], tRNS=struct.pack(">H", 9)),
            [[255] * 3, [200] * 3],
            id="grey with a transparent value",
        ),
        pytest.param(make_png((2, 1), 1, 0, [bytes([0b01000000])]), [[0] * 3, [255] * 3], id="1 bit grey"),
        # A value of 2 or 4 bits is spread over 0 to 255: 1 of 3 is 85, 3 of 15 is 51.
        pytest.param(make_png((2, 1), 2, 0, [bytes([0b01110000])]), [[85] * 3, [255] * 3], id="2 bit grey"),
        pytest.param(make_png((2, 1), 4, 0, [bytes([0x3F])]), [[51] * 3, [255] * 3], id="4 bit grey"),
        pytest.param(
            # 10 at 128 of 255 over white: (10 * 128 + 255 * 127) / 255 = 132.
            make_png((2, 1), 8, 3, [bytes([0, 1])], PLTE=PALETTE, tRNS=bytes([128])),
            [[132, 137, 142], [200, 100, 50]],
            id="palette with a half transparent colour",
        ),
    ],
)
def test_every_image_mode_becomes_rgb(data: bytes, expected: list[list[int]]) -> None:
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.tolist() == [expected]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (0, [[1, 2, 3], [4, 5, 6]]),  # no orientation, written by some cameras
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(orientation: int, expected: list[list[int]], file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array([[1, 2, 3], [4, 5, 6]], np.uint8).repeat(16, 0).repeat(16, 1) * 40
    options = {"PNG": {}, "JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "TIFF": {}}[file_format]
    image = decode_image(encode(Image.fromarray(stored), file_format, exif=exif, **options))
    assert (image[8::16, 8::16, 0] // 39).tolist() == expected


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


def make_blank_png(side: int) -> bytes:
    """A whole PNG of black pixels of one bit; 30,000 x 30,000 of them are 900 MB once decoded."""
    row = bytes((side + 7) // 8)
    return make_png((side, side), 1, 0, (row for _ in range(side)))


# Not getrusage's peak: a child inherits that of the process that started it, and a large test run hides all growth.
_MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from prompt_diffusion.data.transforms import decode_image, encode_png

def read_peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

decode_image(encode_png(np.zeros((8, 8, 3), np.uint8)))  # loads the decoder
data = sys.stdin.buffer.read()
before = read_peak_bytes()
try:
    decode_image(data)
except ValueError as error:
    print(error)
print(read_peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (9_000, f"the image has 9000 x 9000 pixels, more than {transforms.MAX_PIXELS}"),
        (30_000, "the image cannot be decoded: Image size (900000000 pixels) exceeds limit"),  # by Pillow's own check
    ],
)
def test_an_oversized_image_is_refused_before_it_takes_memory(side: int, reason: str) -> None:
    data = make_blank_png(side)
    assert len(data) < 2**20
    answer = subprocess.run([sys.executable, "-c", _MEASURE], input=data, capture_output=True, check=True)
    given, growth = answer.stdout.decode().splitlines()
    assert given.startswith(reason)
    assert int(growth) < 50 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_the_measure_of_memory_sees_an_image_that_is_decoded() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", _MEASURE], input=make_blank_png(8_000), capture_output=True, check=True
    )
    assert int(answer.stdout) > 50 * 2**20


def test_a_bomb_of_text_in_a_small_image_is_refused() -> None:
    comment = zlib.compress(bytes(100 * 2**20))
    data = make_png((2, 1), 8, 0, [bytes([1, 2])], zTXt=b"Comment\0\0" + comment)
    with pytest.raises(ValueError, match=r"^the image cannot be decoded: Decompressed data too large"):
        decode_image(data)


@pytest.mark.parametrize(
    "chunks",
    [
        {"zTXt": b"Workflow\0\0" + zlib.compress(bytes(2 * 2**20))},
        {"iCCP": b"Printer\0\0" + zlib.compress(bytes(5 * 2**20))},
        {"tEXt": b"Comment\0" + b"x" * 2**21},
    ],
    ids=["text of an editor", "profile of a printer", "plain text"],
)
def test_an_intact_picture_with_much_beside_its_pixels_is_read(chunks: dict[str, bytes]) -> None:
    assert decode_image(make_png((2, 1), 8, 0, [bytes([1, 2])], **chunks))[..., 0].tolist() == [[1, 2]]


def make_exif(*entries: bytes, num_entries: int | None = None) -> bytes:
    """Return an EXIF block of entries of 12 bytes; the rational -1/0 stands behind them."""
    count = len(entries) if num_entries is None else num_entries
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, count)
    return head + b"".join(entries) + struct.pack("<I", 0) + struct.pack("<ii", -1, 0)


TURNED = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize(
    ("exif", "is_turned"),
    [
        (make_exif(TURNED, struct.pack("<HHII", 0x829A, 10, 1, 38)), True),  # an exposure of -1/0 seconds, signed
        (make_exif(TURNED, struct.pack("<HHII", 0x829A, 5, 1, 38)), True),  # the same bytes, unsigned
        (make_exif(TURNED, struct.pack("<HHII", 0x829A, 5, 9, 2**31)), True),  # beyond the end
        (make_exif(struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0")), False),  # an orientation in words
        (make_exif(TURNED, num_entries=60_000), True),
        (b"Exif\0\0II*", False),
        (b"Exif\0\0", False),
    ],
)
def test_odd_exif_of_an_intact_picture_does_not_matter(exif: bytes, is_turned: bool) -> None:
    data = encode(Image.new("RGB", (16, 8), (200, 0, 0)), "JPEG", exif=exif)
    assert decode_image(data).shape == ((16, 8, 3) if is_turned else (8, 16, 3))


def make_dds(pixel_format: int) -> bytes:
    header = struct.pack("<7I44x", 124, 0x1007, 4, 4, 0, 0, 0)
    fourcc = struct.pack("<2I4s5I", 32, 0x4, struct.pack("<I", pixel_format), 0, 0, 0, 0, 0)
    return b"DDS " + header + fourcc + bytes(20) + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(make_dds(0x30315859), id="DDS"),
        pytest.param(b"BLP2" + struct.pack("<iBBBB2I", 1, 9, 8, 0, 0, 4, 4) + bytes(2000), id="BLP2"),
        pytest.param(b"BLP1" + struct.pack("<6i", 7, 0, 4, 4, 9, 9) + bytes(2000), id="BLP1"),
        pytest.param(b"\x00\x00\x01\x00\x01\x00" + bytes(40), id="ICO"),
        pytest.param(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 9) + bytes(40), id="PSD"),
        pytest.param(b"P7\nWIDTH 2\nENDHDR\n", id="PAM"),
        pytest.param(b"qoif" + struct.pack(">2I2B", 4, 4, 9, 9), id="QOI"),
        pytest.param(b"\x59\xa6\x6a\x95" + bytes(40), id="SUN"),
        pytest.param(b"SIMPLE  =                    T" + b" " * 2850, id="FITS"),
    ],
)
def test_a_format_that_pillow_reads_in_part_is_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^the image [^\n]*$"):
        decode_image(data)


@pytest.mark.parametrize("error", [NotImplementedError, ZeroDivisionError, RecursionError, AssertionError, KeyError])
def test_whatever_a_decoder_raises_is_a_value_error_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: object) -> None:
        raise error

    data = encode_png(np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=f"^the image cannot be decoded: {error.__name__}$"):
        decode_image(data)


@pytest.mark.parametrize(
    ("white", "expected"), [(65535, [0, 4, 39, 255]), (10_000, [0, 26, 255, 255]), (1, [0, 255, 255, 255])]
)
def test_16_bit_grey_is_scaled_by_the_value_that_is_white(white: int, expected: list[int]) -> None:
    assert decode_image(make_16_bit([0, 1_000, 10_000, 65_535]), white)[0, :, 0].tolist() == expected
    assert decode_image(encode(Image.new("L", (1, 1), 77)), white)[0, 0, 0] == 77


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


def test_a_grey_picture_is_written_as_one_channel_and_read_back_as_three() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (40, 50, 1), dtype=np.uint8), 3, axis=2)
    coloured = grey.copy()
    coloured[0, 0, 2] ^= 1
    assert Image.open(io.BytesIO(encode_png(grey))).mode == "L"
    assert Image.open(io.BytesIO(encode_png(coloured))).mode == "RGB"
    np.testing.assert_array_equal(decode_image(encode_png(grey)), grey)
    np.testing.assert_array_equal(decode_image(encode_png(coloured)), coloured)
    assert len(encode_png(grey)) < 0.5 * len(encode_png(coloured))
