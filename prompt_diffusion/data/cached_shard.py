"""A cached shard: a folder with one file per column, of rows of equal size, whole and as it was written or not there.

``layout.json`` says where the rows are and holds a digest of every file; it is written last, and the folder is then moved to
its place at once.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prompt_diffusion.data.records import IMAGE_TYPE, read_array
from prompt_diffusion.data.transforms import Pixels, decode_image
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest

logger = logging.getLogger(__name__)

Array = NDArray[Any]

_LAYOUT_FILE = "layout.json"


class BrokenEntryError(Exception):
    """An entry exists but is not what was written."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where the rows of one column are stored."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    row_bytes: int
    rows: int


def decode_columns(table: pa.Table) -> dict[str, Array]:
    """Return a shard's images and arrays by column, one entry per row."""
    columns: dict[str, Array] = {}
    for field in table.schema:
        if field.type == IMAGE_TYPE:
            columns[field.name] = _decode_images(table[field.name])
        elif pa.types.is_fixed_size_binary(field.type):
            columns[field.name] = read_array(table, field.name)
    return columns


def write_columns(place: Path, columns: Mapping[str, Array]) -> None:
    """Write an entry, whole or not at all, in place of what is left of a broken one."""
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir()
        layout = {}
        for number, (name, values) in enumerate(columns.items()):
            file = f"column-{number:03d}"  # not by its name, which may be anything
            digest = _write_file(partial / file, np.ascontiguousarray(values).data.cast("B"))
            layout[name] = {"file": file, "shape": values.shape, "dtype": values.dtype.str, "sha256": digest}
        content = json.dumps({"columns": layout})
        sealed = json.dumps({"content": content, "digest": compute_digest(content.encode())})
        _write_file(partial / _LAYOUT_FILE, memoryview(sealed.encode()))  # last: all it lists is on the disk
        _sync_folder(partial)
        remove(place)  # what is left of a broken one
        os.replace(partial, place)
        _sync_folder(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_layout(place: Path) -> dict[str, Column]:
    """Return where the columns are stored, after checking their bytes; FileNotFoundError where there is no entry.

    BrokenEntryError where any part of it is missing or not as it was written.
    """
    try:
        sealed = json.loads((place / _LAYOUT_FILE).read_text())
        if compute_digest(sealed["content"].encode()) != sealed["digest"]:
            raise BrokenEntryError(f"{_LAYOUT_FILE} was altered")
        layout: Mapping[str, dict[str, Any]] = json.loads(sealed["content"])["columns"]
        columns = {}
        for name, content in layout.items():
            file, (rows, *shape), dtype = place / content["file"], content["shape"], np.dtype(content["dtype"])
            if digest_file(file) != content["sha256"]:
                raise BrokenEntryError(f"the column {name} is not as it was written")
            row_bytes = dtype.itemsize * int(np.prod(shape))
            columns[name] = Column(str(file), tuple(shape), dtype, row_bytes, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not place.exists():
            raise FileNotFoundError(place) from error
        raise BrokenEntryError(f"{type(error).__name__}: {error}") from error
    return columns


def is_whole(place: Path) -> bool:
    """Say whether an entry exists as it was written; a broken one is logged."""
    try:
        read_layout(place)
    except FileNotFoundError:
        return False
    except BrokenEntryError as error:
        logger.warning("the shard cache's %s cannot be used (%s): made anew", place, error)
        return False
    return True


def read_into(values: Array, column: Column, row: int) -> int:
    """Read one row of a column; return the number of bytes read."""
    handle = os.open(column.file, os.O_RDONLY)
    try:
        return os.preadv(handle, [values.data], row * column.row_bytes)
    finally:
        os.close(handle)


def touch(place: Path) -> None:
    """Mark an entry as used; FileNotFoundError where it is gone."""
    os.utime(place)


def remove(place: Path) -> None:
    """Move an entry away atomically, then delete its files: no process sees a part of it."""
    doomed = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.replace(place, doomed)
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    else:  # a file in its place, or nothing
        doomed.unlink(missing_ok=True)


def _decode_images(column: pa.ChunkedArray) -> Pixels:
    images = np.stack([decode_image(cell["bytes"].as_py()) for cell in column])
    is_grey = all(bool((image[..., :1] == image).all()) for image in images)  # stops at the first one in colour
    return np.ascontiguousarray(images[..., :1]) if is_grey else images


def _write_file(path: Path, content: memoryview) -> str:
    """Write a file and flush it to the disk; return its sha256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
