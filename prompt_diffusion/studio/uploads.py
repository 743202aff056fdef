"""Uploads: how much is kept, and that a request names no other files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prompt_diffusion.studio.limits import MAX_FILES, MAX_FOLDER_BYTES, MAX_UPLOAD_BYTES, is_upload
from prompt_diffusion.studio.refusal import RefusedError

_MAX_DEPTH = 40
_MULTIPART_BYTES = 64 << 10  # names and borders around an uploaded file


def check_upload(num_bytes: int, folder: Path) -> None:
    """Refuse what is too large, and everything once the folder is full."""
    if num_bytes > MAX_UPLOAD_BYTES + _MULTIPART_BYTES:
        megabytes = MAX_UPLOAD_BYTES >> 20
        raise RefusedError(
            413, f"The upload has {num_bytes / 2**20:.1f} MB. One request may upload up to {megabytes} MB."
        )
    num_files, stored = _measure_folder(folder)
    if stored + num_bytes > MAX_FOLDER_BYTES or num_files >= MAX_FILES:
        raise RefusedError(
            507,
            f"the page keeps up to {MAX_FILES} files of {MAX_FOLDER_BYTES >> 20} MB together and has {num_files} of "
            f"{stored >> 20} MB: they go a day after they came, or when the page is started again",
        )


def check_files(body: bytes, folder: Path) -> None:
    """Refuse a request that names a file outside the uploads; the response is the same whether it exists or not."""
    try:
        content = json.loads(body)
        named = [each["path"] for each in _walk(content) if each.get("path") is not None]
    except (ValueError, RecursionError):
        raise RefusedError(400, "the request is not JSON that is taken") from None
    for path in named:
        if not isinstance(path, str) or not is_upload(path, folder):
            raise RefusedError(403, "a request may only name files that were uploaded to this page")


def _walk(content: Any, depth: int = 0) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - any JSON
    """Yield every object in a JSON value; ValueError where it is nested deeper than any request of the page."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(content, dict):
        yield content
    for each in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _walk(each, depth + 1)


def _measure_folder(folder: Path) -> tuple[int, int]:
    """Return how many files a folder holds, and their bytes."""
    num_files = num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                num_bytes += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
            except FileNotFoundError:  # deleted just now
                continue
            num_files += 1
    return num_files, num_bytes
