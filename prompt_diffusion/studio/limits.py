"""What the page takes: how large an upload may be, and how many requests may wait."""

import io
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

MAX_UPLOAD_BYTES = 20 * 1024 * 1024
MAX_UPLOAD_PIXELS = 16 * 1024 * 1024
MAX_WAITING = 8
"""Requests that may wait for the model; one more is told to come back."""
MAX_STEPS = 200
MAX_SIZE = 1024
MAX_HISTORY = 24
"""Results that one visitor's page keeps; the oldest goes first."""


def read_upload(path: str) -> bytes:
    """Return an image file's bytes, its size and its header checked before anything is decoded.

    ValueError, in one sentence, for what is too large or no image.
    """
    file = Path(path)
    num_bytes = file.stat().st_size
    if num_bytes > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"the file has {num_bytes / 2**20:.1f} MB, more than {MAX_UPLOAD_BYTES // 2**20} MB: make it smaller first"
        )
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"{file.name} is not an image file that can be read: use PNG, JPEG or WebP") from None
    if width * height > MAX_UPLOAD_PIXELS:
        raise ValueError(
            f"the image has {width} x {height} pixels, more than {MAX_UPLOAD_PIXELS // 2**20} megapixels: make it smaller "
            "first"
        )
    return data


def build_upload(label: str, elem_id: str, height: int = 210) -> gr.Image:
    """Draw a place to drop an image, or to paste one.

    It hands the actions the path of the very file that was uploaded: nothing opens it before they do.
    """
    image = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=height,
        elem_id=elem_id,
        elem_classes="picture",
    )
    image.preprocess = _take_path  # of this instance: a subclass would have a stub file written beside its module
    return image


def _take_path(payload: Any) -> str | None:  # noqa: ANN401 - gradio's data of a file
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("The image did not arrive as a file: drop it again.", print_exception=False)
    return str(payload.path)
