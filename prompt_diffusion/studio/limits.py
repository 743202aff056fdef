"""What the page accepts: how large an upload may be, and how many requests may wait."""

from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from prompt_diffusion.image_files import ImageError, open_image

MAX_UPLOAD_BYTES = 20 * 1024 * 1024
MAX_BODY_BYTES = 1 << 20
"""Of a request that uploads nothing."""
MAX_FOLDER_BYTES = 2 << 30
"""Of all uploads and results that the page keeps, for all visitors together."""
MAX_FILES = 5000
"""Their maximum number."""
MAX_UPLOAD_PIXELS = 16 * 1024 * 1024
MAX_WAITING = 8
"""Requests that may wait for the model; one more is told to come back."""
MAX_STEPS = 200
MAX_SIZE = 1024
MAX_HISTORY = 24
"""Results that one visitor's page keeps; the oldest is dropped first."""


def read_upload(path: str) -> bytes:
    """Return an image file's bytes, its size and its header checked before anything is decoded.

    A one-sentence ValueError for a file that is too large or not an image.
    """
    file = Path(path)
    num_bytes = file.stat().st_size
    if num_bytes > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"the file has {num_bytes / 2**20:.1f} MB, more than {MAX_UPLOAD_BYTES // 2**20} MB: make it smaller first"
        )
    data = file.read_bytes()
    try:
        with open_image(data) as image:
            width, height = image.size
    except ImageError:
        raise ValueError(f"{file.name} is not an image file that can be read: use PNG, JPEG or WebP") from None
    if width * height > MAX_UPLOAD_PIXELS:
        raise ValueError(
            f"the image has {width} x {height} pixels, more than {MAX_UPLOAD_PIXELS // 2**20} megapixels: make it smaller "
            "first"
        )
    return data


def build_upload(label: str, elem_id: str, height: int = 210) -> gr.Image:
    """Draw a place to drop an image, or to paste one.

    It passes the actions the path of the uploaded file itself: nothing opens it before they do.
    """
    return _UploadedImage(
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


def is_upload(path: str, folder: Path) -> bool:
    """Say whether a path, wherever its links lead, lies in the folder of uploads."""
    if "\0" in path:
        return False
    try:
        return Path(path).is_absolute() and Path(path).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a name too long, or links in a circle
        return False


def _take_path(image: gr.Image, payload: Any) -> str | None:  # noqa: ANN401 - gradio's data of a file
    """Return the uploaded file's path; of any other file the answer does not say whether there is one."""
    if payload is None:
        return None
    folder = Path(get_upload_folder())
    if payload.path is None or not is_upload(str(payload.path), folder) or not Path(payload.path).is_file():
        raise gr.Error("The image is not on this page (any more): drop it again.", print_exception=False)
    return str(payload.path)


# A class, since gradio makes a component anew when an action changes its label, and what was set on the old one is lost.
# Made without gradio's own metaclass call, which would write a stub file beside this module.
_UploadedImage = ABCMeta.__new__(
    type(gr.Image), "Image", (gr.Image,), {"preprocess": _take_path, "__module__": __name__}
)
