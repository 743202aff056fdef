"""A PNG that says how it was made.

One JSON object in the text chunk ``prompt-diffusion``: the request with every default filled in, and the SHA-256 of each image
file that went in, as ``sha256sum`` prints it. It names no path and no machine.
"""

import json
import struct
import zlib
from typing import Literal

from pydantic import ValidationError

from prompt_diffusion.data.transforms import Pixels, encode_png
from prompt_diffusion.frozen import FrozenModel, say_first_error
from prompt_diffusion.generation.request import GenerationRequest
from prompt_diffusion.image_files import open_image

SETTINGS_KEY = "prompt-diffusion"
"""The keyword of the text chunk."""
_AFTER_HEADER = 33  # bytes of a PNG's signature and its first chunk, which is of fixed size


class GenerationRecord(FrozenModel):
    """What a PNG says about itself: enough to make it again from the same images and the same model."""

    format: Literal[1] = 1
    """Incremented when a field changes its meaning."""
    request: GenerationRequest
    """The request with every default filled in: the model as a version, not an alias; for a folder, only its own name."""
    model_fingerprint: str | None = None
    """The fingerprint of the model, where it is a registered one."""
    images: dict[str, str]
    """SHA-256 of each image file that went in: ``query``, ``example_1_source``, ``example_1_target``, ..."""
    versions: dict[str, str]
    """Versions of what computed it."""


def encode_result(image: Pixels, record: GenerationRecord) -> bytes:
    """Return a PNG of uint8 (H, W, 3) that carries its settings; the pixels stay as they are."""
    png = encode_png(image)
    text = json.dumps(record.model_dump(mode="json"), sort_keys=True)  # ASCII, as this kind of chunk requires
    body = b"tEXt" + SETTINGS_KEY.encode() + b"\0" + text.encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:_AFTER_HEADER] + chunk + png[_AFTER_HEADER:]


def read_record(png: bytes) -> GenerationRecord:
    """Return what a PNG of ours carries; ValueError, in one sentence, where it carries nothing, or something else."""
    with open_image(png) as image:
        image.load()
        text = getattr(image, "text", {}).get(SETTINGS_KEY)
    if text is None:
        raise ValueError("the image carries no settings: it was not made here, or another program saved it again")
    try:
        return GenerationRecord.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"the settings in the image cannot be read: {say_first_error(error)}") from None
