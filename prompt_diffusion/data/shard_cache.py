"""The local shard cache: columns of sealed shards as plain arrays on a disk, so that any row is one read away.

A shard is fetched whole and checked against its digest, its images are decoded, and each column becomes one file of rows of
equal size. After that a sample costs no decoding and no request: a row is read by its position, through the machine's page
cache, which all processes share. Entries are named by the shard's own digest. All of it may be deleted at any time, in whole or
in part: an entry is checked when a process first opens it, and one that is not as it was written is made anew.
"""

import fcntl
import hashlib
import json
import logging
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
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.manifest import Manifest

logger = logging.getLogger(__name__)

Array = NDArray[Any]

_LAYOUT_FILE = "layout.json"
_TOUCH_SECONDS = 60.0
_MAX_TRIES = 20


class _BrokenEntryError(Exception):
    """An entry is there and is not what was written."""


@dataclass(frozen=True, slots=True)
class _Column:
    """Where the rows of one column lie."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    row_bytes: int
    rows: int


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
        for _ in range(_MAX_TRIES):
            entry = self._find(manifest, shard)
            found = _find_column(entry, column, manifest)
            if not 0 <= row < found.rows:
                raise IndexError(f"{manifest.shards[shard].path} of {manifest.ref.uri} has no row {row}")
            values = out
            if values is None or (values.shape, values.dtype) != (found.shape, found.dtype):
                values = np.empty(found.shape, found.dtype)
            try:
                size = _read_into(values, found, row)
            except (
                FileNotFoundError,
                NotADirectoryError,
                IsADirectoryError,
            ):  # another made room, or it was deleted by hand
                size = 0
            if size == found.row_bytes:
                return values
            self._entries.pop(manifest.shards[shard].sha256, None)  # gone, or cut short, since it was opened
        raise self._give_up(manifest, shard)

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
        for _ in range(_MAX_TRIES):
            try:
                _touch(place)
                return _read_layout(place)
            except (FileNotFoundError, _BrokenEntryError):  # not cached yet, deleted just now, or not whole
                with self._hold(place.name):  # one process fetches, the others wait
                    if not _is_whole(place):
                        self._fill(place, manifest, shard)
        raise self._give_up(manifest, shard)

    def _give_up(self, manifest: Manifest, shard: int) -> OSError:
        return OSError(
            f"the shard cache {self.folder} loses {manifest.shards[shard].path} of {manifest.ref.uri} once it is written: "
            "something else deletes or alters it, or cache_bytes is too small for all who share it"
        )

    def _fill(self, place: Path, manifest: Manifest, shard: int) -> None:
        columns = _decode_columns(manifest.read_shard(manifest.shards[shard]))
        self._make_room(sum(values.nbytes for values in columns.values()))
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
            _write_file(partial / _LAYOUT_FILE, memoryview(sealed.encode()))  # last: what it lists is on the disk
            _sync_folder(partial)
            _remove(place)  # what is left of a broken one
            os.replace(partial, place)
            _sync_folder(self.folder)
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
    """Return where the columns lie, the bytes of all checked; FileNotFoundError where there is no entry at all.

    _BrokenEntryError where anything of it is missing or not as it was written.
    """
    try:
        sealed = json.loads((place / _LAYOUT_FILE).read_text())
        if compute_digest(sealed["content"].encode()) != sealed["digest"]:
            raise _BrokenEntryError(f"{_LAYOUT_FILE} was altered")
        layout: Mapping[str, dict[str, Any]] = json.loads(sealed["content"])["columns"]
        columns = {}
        for name, content in layout.items():
            file, (rows, *shape), dtype = place / content["file"], content["shape"], np.dtype(content["dtype"])
            if digest_file(file) != content["sha256"]:
                raise _BrokenEntryError(f"the column {name} is not as it was written")
            row_bytes = dtype.itemsize * int(np.prod(shape))
            columns[name] = _Column(str(file), tuple(shape), dtype, row_bytes, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not place.exists():
            raise FileNotFoundError(place) from error
        raise _BrokenEntryError(f"{type(error).__name__}: {error}") from error
    return columns


def _is_whole(place: Path) -> bool:
    """Say whether an entry is there and as it was written; what is broken is logged."""
    try:
        _read_layout(place)
    except FileNotFoundError:
        return False
    except _BrokenEntryError as error:
        logger.warning("the shard cache's %s cannot be used (%s): made anew", place, error)
        return False
    return True


def _write_file(path: Path, content: memoryview) -> str:
    """Write a file, on the disk when this returns; return its sha256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_into(values: Array, column: _Column, row: int) -> int:
    """Read one row of a column; return how many bytes there were of it."""
    handle = os.open(column.file, os.O_RDONLY)
    try:
        return os.preadv(handle, [values.data], row * column.row_bytes)
    finally:
        os.close(handle)


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
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    else:  # a file in its place, or nothing
        doomed.unlink(missing_ok=True)
