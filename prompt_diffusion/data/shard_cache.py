"""The local shard cache: columns of sealed shards as plain arrays on a disk, so that any row is one read away.

A shard is fetched whole and checked against its digest, its images are decoded, and each column becomes one file of rows of
equal size. After that a sample costs no decoding and no request: a row is read by its position, through the machine's page
cache, which all processes share. Entries are named by the shard's own digest; one that exists is whole.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prompt_diffusion.data.records import IMAGE_TYPE, read_array
from prompt_diffusion.data.transforms import Pixels, decode_image
from prompt_diffusion.settings import load_settings
from prompt_diffusion.store.manifest import Manifest

Array = NDArray[Any]

_LAYOUT_FILE = "layout.json"
_TOUCH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Column:
    """Where the rows of one column lie."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    row_bytes: int


@dataclass(slots=True)
class _Entry:
    """A cached shard, and when this process last said that it uses it."""

    columns: dict[str, _Column]
    touched: float


class ShardCache:
    """Cached shards below one folder, for any number of threads and processes of a machine."""

    def __init__(self, folder: Path | None = None, max_bytes: int | None = None) -> None:
        """Take the folder (None: `shards` in the settings' cache directory) and its limit (None: no limit)."""
        self.folder = folder or load_settings().cache_dir / "shards"
        self.max_bytes = max_bytes
        self._entries: dict[str, _Entry] = {}

    def read_row(self, manifest: Manifest, shard: int, column: str, row: int, out: Array | None = None) -> Array:
        """Return one row of a column: an image as uint8 H, W, C (C is 1 where the whole shard is grey), else as it was made.

        It is read into ``out``, a contiguous array, where that has the row's shape and type: then ``out`` is returned.
        Fetches the shard first where it is not cached; DamagedDataError where it is not what was sealed.
        """
        while True:
            entry = self._find(manifest, shard)
            found = _find_column(entry, column, manifest)
            values = out
            if values is None or (values.shape, values.dtype) != (found.shape, found.dtype):
                values = np.empty(found.shape, found.dtype)
            try:
                handle = os.open(found.file, os.O_RDONLY)
            except FileNotFoundError:  # another process made room just now
                self._entries.pop(manifest.shards[shard].sha256, None)
                continue
            try:
                size = os.preadv(handle, [values.data], row * found.row_bytes)
            finally:
                os.close(handle)
            if size != found.row_bytes:
                raise IndexError(f"{manifest.shards[shard].path} of {manifest.ref.uri} has no row {row}")
            return values

    def fetch(self, manifest: Manifest, shard: int) -> None:
        """Make sure that a shard is cached; ahead of its use, from another thread."""
        self._find(manifest, shard)

    def _find(self, manifest: Manifest, shard: int) -> _Entry:
        digest = manifest.shards[shard].sha256
        entry = self._entries.get(digest)
        now = time.monotonic()
        if entry is None:
            entry = _Entry(self._load(manifest, shard), now)
            self._entries[digest] = entry
        elif self.max_bytes is not None and now - entry.touched > _TOUCH_SECONDS:
            entry.touched = now
            with suppress(FileNotFoundError):
                _touch(self.folder / digest)
        return entry

    def _load(self, manifest: Manifest, shard: int) -> dict[str, _Column]:
        place = self.folder / manifest.shards[shard].sha256
        while True:
            try:
                _touch(place)
                return _read_layout(place)
            except FileNotFoundError:  # not cached yet, or another process made room just now
                with self._hold(place.name):  # one process fetches, the others wait
                    if not place.is_dir():
                        self._fill(place, manifest, shard)

    def _fill(self, place: Path, manifest: Manifest, shard: int) -> None:
        columns = _decode_columns(manifest.read_shard(manifest.shards[shard]))
        self._make_room(sum(values.nbytes for values in columns.values()))
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            partial.mkdir()
            layout = {}
            for name, values in columns.items():
                with (partial / name).open("wb") as file:
                    values.tofile(file)
                    os.fsync(file.fileno())  # on the disk before it gets its name: nothing checks it later
                layout[name] = {"shape": values.shape[1:], "dtype": values.dtype.str}
            (partial / _LAYOUT_FILE).write_text(json.dumps(layout))
            os.replace(partial, place)
        except OSError as error:
            way_out = "give another cache_dir, or less cache_bytes"
            message = f"the shard cache {self.folder} cannot be written ({error.strerror}): {way_out}"
            raise OSError(error.errno, message) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used entries until so many bytes more are within the limit."""
        if self.max_bytes is None:
            return
        entries = []
        for place in self.folder.iterdir():
            if place.is_dir() and not place.name.startswith("."):
                try:
                    size = sum(file.stat().st_size for file in place.iterdir())
                    entries.append((place.stat().st_mtime, size, place))
                except FileNotFoundError:
                    continue
        total = sum(size for _, size, _ in entries)
        for _, size, place in sorted(entries):
            if total + num_bytes <= self.max_bytes:
                break
            _remove(place)
            total -= size

    @contextmanager
    def _hold(self, name: str) -> Iterator[None]:
        """Hold the lock of one entry; it ends with its process, however that ends."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _decode_columns(table: pa.Table) -> dict[str, Array]:
    """Return what a shard holds of images and arrays, by column, a row each."""
    columns: dict[str, Array] = {}
    for field in table.schema:
        if field.type == IMAGE_TYPE:
            columns[field.name] = _decode_images(table[field.name])
        elif pa.types.is_fixed_size_binary(field.type):
            columns[field.name] = read_array(table, field.name)
    return columns


def _decode_images(column: pa.ChunkedArray) -> Pixels:
    images = np.stack([decode_image(cell["bytes"].as_py()) for cell in column])
    is_grey = all(bool((image[..., :1] == image).all()) for image in images)  # ends at the first one in colour
    return np.ascontiguousarray(images[..., :1]) if is_grey else images


def _read_layout(place: Path) -> dict[str, _Column]:
    layout: Mapping[str, dict[str, Any]] = json.loads((place / _LAYOUT_FILE).read_text())
    columns = {}
    for name, content in layout.items():
        shape, dtype = tuple(content["shape"]), np.dtype(content["dtype"])
        columns[name] = _Column(str(place / name), shape, dtype, dtype.itemsize * int(np.prod(shape)))
    return columns


def _find_column(entry: _Entry, name: str, manifest: Manifest) -> _Column:
    if name not in entry.columns:
        raise ValueError(f"{manifest.ref.uri} has no column {name!r}, only {', '.join(entry.columns)}")
    return entry.columns[name]


def _touch(place: Path) -> None:
    """Say that an entry is in use; FileNotFoundError where it is gone."""
    os.utime(place)


def _remove(place: Path) -> None:
    """Take an entry away at once, then delete its files: nobody sees a part of it."""
    doomed = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.replace(place, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
