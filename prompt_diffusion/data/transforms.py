"""Pixels in and out: any image file to uint8 RGB, one Lanczos resize, and the value range that the models see."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from prompt_diffusion.image_files import MAX_PIXELS, ImageError, check_format, open_image

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]

WHITE_16_BIT = 65535
"""The 16-bit grey value that is white, as PNG and TIFF mean it."""
_ORIENTATION = ExifTags.Base.Orientation
_SAME_SHAPE = 1.02  # the largest difference of aspect within a pair
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, white: int = WHITE_16_BIT) -> Pixels:
    """Decode an image file to uint8 RGB (H, W, 3), rotated as its EXIF says, alpha over white, 16-bit grey scaled to 8.

    ``white`` is the 16-bit grey value that becomes 255, as does all above it. ImageError, in one sentence, for what is
    empty, damaged, truncated, animated, larger than 64 megapixels, or of a format that is not accepted (``IMAGE_FORMATS``).
    """
    with open_image(data) as image:
        _check_header(image)
        image.load()
        return normalise_image(image, white)


def read_image_file(path: Path) -> bytes:
    """Return the bytes of a file, not yet decoded; ValueError, in one sentence, where there is no file that can be read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no image file {path}") from None
    except OSError as error:
        raise ValueError(f"the image file {path} cannot be read: {error.strerror}") from error


def _check_header(image: Image.Image) -> None:
    """Refuse by the header alone what must not be decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS}")
    # An MPO is a photograph: phones and stereo cameras add a preview or a depth map as a second frame.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ImageError(f"the image is animated or has pages: {getattr(image, 'n_frames', 1)} frames")


def normalise_image(image: Image.Image, white: int = WHITE_16_BIT) -> Pixels:
    """Return any Pillow mode as uint8 RGB (H, W, 3), as ``decode_image`` says; ImageError for pixels of an unknown range."""
    check_format(image)
    image = _turn_upright(image)
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip instead of scaling
        wide = np.asarray(image).astype(np.int64)
        if wide.size and (wide.min() < 0 or wide.max() > 65535):
            raise ImageError(f"the image has grey values from {wide.min()} to {wide.max()}, beyond 16 bit")
        grey = ((np.minimum(wide, white) * 255 + white // 2) // white).astype(np.uint8)
        if "transparency" in image.info:
            grey[wide == image.info["transparency"]] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Return the image rotated as its EXIF says; unchanged where the EXIF cannot be read.

    Pillow's own function rewrites the EXIF without the orientation, and fails on entries that do not concern it.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF in an intact picture: its parser stumbles in as many ways as the formats'
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def encode_png(image: Pixels) -> bytes:
    """Encode uint8 (H, W, 3) as PNG: lossless, and a function of the pixels alone; one channel where all three are equal."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a PNG is made of uint8 (H, W, 3), got {image.dtype} {image.shape}")
    is_grey = bool((image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all())
    buffer = io.BytesIO()
    # Most condition maps are grey: as one channel they take half the bytes and less than half the time.
    Image.fromarray(np.ascontiguousarray(image[..., 0]) if is_grey else image).save(
        buffer, format="PNG", compress_level=6
    )
    return buffer.getvalue()


def resize_image(image: Pixels, size: int) -> Pixels:
    """Cut the centre square of uint8 (H, W, 3) and resize it once, by Lanczos, to (size, size, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(image[top : top + side, left : left + side])
    if side == size:
        return square
    return np.array(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)


def check_pair_shape(source: Pixels, target: Pixels, name: str) -> None:
    """Raise ValueError where the images of an example pair differ in shape, so that their centre squares would not match.

    Different sizes of one shape become the same picture when resized; two percent allows for rounding to whole pixels.
    """
    (height, width), (other_height, other_width) = source.shape[:2], target.shape[:2]
    ratio = width * other_height / (other_width * height)
    if not 1 / _SAME_SHAPE <= ratio <= _SAME_SHAPE:
        raise ValueError(
            f"{name}: its source has {width} x {height} pixels and its target {other_width} x {other_height}, which is another "
            "shape: cut both alike"
        )


def to_model_range(images: "Pixels | torch.Tensor") -> "torch.Tensor":
    """Turn uint8 (N, H, W, C), an array or a tensor on any device, into float32 (N, C, H, W) in [-1, 1]."""
    import torch

    values = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    return values.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


def from_model_range(images: "torch.Tensor") -> Pixels:
    """Turn (N, 3, H, W) in [-1, 1] into uint8 (N, H, W, 3), clipped and rounded to nearest."""
    import torch

    values = ((images.detach().to("cpu", torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels: Pixels = values.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
