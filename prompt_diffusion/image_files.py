"""The one door through which image files come in: an allow-list of formats whose decoders stay inside this process.

Pillow knows some forty formats. Left to choose, it hands EPS to Ghostscript, a PostScript interpreter, where that is
installed, and opens rare formats by decoders that hardly anybody has tried with hostile bytes.
"""

import io
import struct
import zlib

from PIL import Image, ImageFile, PngImagePlugin

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is taken, as Pillow names it."""
MAX_PIXELS = 64 * 1024 * 1024
"""What is decoded at most, by the header."""
# Intact files carry megabytes of text (an editor's workflow) or a printer's colour profile; 64 MiB in all stay the limit.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 1024 * 1024
# What Pillow's decoders raise on damaged data, beside OSError: each format's parser has its own way to stumble.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, AttributeError, MemoryError,
    NotImplementedError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_OPENED_AS = (*IMAGE_FORMATS, "MPO")  # a JPEG with a second picture behind the first is opened as MPO


def open_image(data: bytes) -> Image.Image:
    """Open an image file by its header, whatever its name says; nothing is decoded yet.

    UnidentifiedImageError, an OSError, where it is of no format that is taken; any other error of Pillow's parsers.
    """
    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def check_format(image: Image.Image) -> None:
    """Raise ValueError for an image that a caller opened from a file of another format: it may be decoded only later."""
    if isinstance(image, ImageFile.ImageFile) and image.format not in _OPENED_AS:
        raise ValueError(
            f"the image comes from a {image.format} file, and {', '.join(IMAGE_FORMATS)} are taken: convert it first"
        )
