"""The one door through which image files come in: an allow-list of formats whose decoders stay inside this process.

Pillow knows some forty formats. Left to choose, it hands EPS to Ghostscript, a PostScript interpreter, where that is
installed, and opens rare formats by decoders that hardly anybody has tried with hostile bytes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, PngImagePlugin

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""The formats that are accepted, as Pillow names them."""
MAX_PIXELS = 64 * 1024 * 1024
"""The most pixels that are decoded, by the header."""
# Intact files carry megabytes of text (an editor's workflow) or a printer's colour profile; 64 MiB in all stay the limit.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 1024 * 1024
_OPENED_AS = (*IMAGE_FORMATS, "MPO")  # a JPEG with a second picture behind the first is opened as MPO


class ImageError(ValueError):
    """An image file that is empty, damaged or not accepted; the message is one sentence."""


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image file by its header, whatever its name says; the caller decodes it, or not, within the block.

    ImageError for a format that is not accepted, and in place of whatever Pillow raises within the block.
    """
    if not data:
        raise ImageError("the image is empty")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            yield image
    except ImageError:
        raise
    except Exception as error:  # each format's parser fails in its own way: no list of types is complete
        reason = " ".join(str(error).split()) or type(error).__name__
        # Pillow names the buffer's address, which would differ from run to run.
        reason = "not an image file" if "cannot identify" in reason else reason
        raise ImageError(f"the image cannot be decoded: {reason}") from error


def check_format(image: Image.Image) -> None:
    """Raise ImageError for an image that a caller opened from a file of another format: it may be decoded only later."""
    if isinstance(image, ImageFile.ImageFile) and image.format not in _OPENED_AS:
        raise ImageError(
            f"the image comes from a {image.format} file, and {', '.join(IMAGE_FORMATS)} are taken: convert it first"
        )
