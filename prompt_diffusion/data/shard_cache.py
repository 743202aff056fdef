"""The local shard cache: columns of sealed shards as plain arrays on a disk, so that any row is one read away.

A shard is fetched whole and checked against its digest, its images are decoded, and each column becomes one file of rows of
equal size. After that a sample costs no decoding and no request: a row is read by its position, through the machine's page
cache, which all processes share. Entries are named by the shard's own digest. All of it may be deleted at any time, in whole or
in part: an entry is checked when a process first opens it, and rebuilt if it is not as it was written.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prompt_diffusion.data.cached_shard import (
    Array,
    BrokenEntryError,
    Column,
    decode_columns,
    is_whole,
    read_into,
    read_layout,
    remove,
    touch,
    write_columns,
)
from prompt_diffusion.settings import load_settings
from prompt_diffusion.store.manifest import Manifest

_TOUCH_SECONDS = 60.0
_MAX_TRIES = 20


@dataclass(slots=True)
class _Entry:
    """A cached shard, and when this process last marked it as used."""

    columns: dict[str, Column]
    touched: float


class ShardCache:
    """Cached shards below one folder, for any number of threads and processes of a machine."""

    def __init__(self, folder: Path | None = None, max_bytes: int | None = None) -> None:
        """Take the folder (None: ``shards`` in the settings' cache directory) and its limit (None: no limit)."""
        self.folder = folder or load_settings().cache_dir / "shards"
        self.max_bytes = max_bytes
        self._entries: dict[str, _Entry] = {}

    def read_row(self, manifest: Manifest, shard: int, column: str, row: int, out: Array | None = None) -> Array:
        """Return one row of a column: an image as uint8 H, W, C (C is 1 where the whole shard is grey), else as it was stored.

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
                size = read_into(values, found, row)
            except (
                FileNotFoundError,
                NotADirectoryError,
                IsADirectoryError,
            ):  # another process made room, or it was deleted by hand
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
                touch(self.folder / digest)
        return entry

    def _load(self, manifest: Manifest, shard: int) -> dict[str, Column]:
        place = self.folder / manifest.shards[shard].sha256
        for _ in range(_MAX_TRIES):
            try:
                touch(place)
                return read_layout(place)
            except (FileNotFoundError, BrokenEntryError):  # not cached yet, deleted just now, or not whole
                with self._hold(place.name):  # one process fetches, the others wait
                    if not is_whole(place):
                        self._fill(place, manifest, shard)
        raise self._give_up(manifest, shard)

    def _give_up(self, manifest: Manifest, shard: int) -> OSError:
        return OSError(
            f"the shard cache {self.folder} loses {manifest.shards[shard].path} of {manifest.ref.uri} once it is written: "
            "something else deletes or alters it, or cache_bytes is too small for all who share it"
        )

    def _fill(self, place: Path, manifest: Manifest, shard: int) -> None:
        columns = decode_columns(manifest.read_shard(manifest.shards[shard]))
        self._make_room(sum(values.nbytes for values in columns.values()))
        try:
            write_columns(place, columns)
        except OSError as error:
            way_out = "give another cache_dir, or less cache_bytes"
            message = f"the shard cache {self.folder} cannot be written ({error.strerror}): {way_out}"
            raise OSError(error.errno, message) from error

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used entries until that many more bytes fit within the limit."""
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
            remove(place)
            total -= size

    @contextmanager
    def _hold(self, name: str) -> Iterator[None]:
        """Hold the lock of one entry; it is released when its process ends, however it ends."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _find_column(entry: _Entry, name: str, manifest: Manifest) -> Column:
    if name not in entry.columns:
        raise ValueError(f"{manifest.ref.uri} has no column {name!r}, only {', '.join(entry.columns)}")
    return entry.columns[name]
