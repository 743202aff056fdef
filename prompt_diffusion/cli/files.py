"""Image files in and out of commands: read by name, refused in one sentence, written whole or not at all."""

import os
from pathlib import Path

from prompt_diffusion.store.local_files import temporary_file


def read_picture_file(path: Path) -> bytes:
    """Return the bytes of an image file; ValueError names the file that is not there or cannot be decoded."""
    from prompt_diffusion.data.transforms import decode_image, read_image_file

    data = read_image_file(path)
    try:
        decode_image(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return data


def check_out(path: Path, is_forced: bool) -> None:
    """Raise ValueError, before any work, where a PNG cannot be written to ``path``, or would replace a file unasked."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path} must end in .png: results are PNG files, which keep every pixel")
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: the folder {path.parent} cannot be written to")
    if path.exists() and not is_forced:
        raise ValueError(f"{path} is there already: name another file, or add --force to replace it")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with temporary_file(path, data) as temporary:
        temporary.replace(path)
