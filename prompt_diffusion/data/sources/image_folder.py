"""The `image_folder` source: a user's own images with captions, or (source, target) pairs of a user's own vision task.

A table beside the images lists them, named as Hugging Face's image folders name it: `metadata.csv`, `metadata.jsonl` or
`metadata.parquet`, with the columns `file_name` and `caption`; for pairs `source_file_name`, `target_file_name` and
`caption`. A column `group` may join images into prompt groups. One image stands on both sides of its record.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.base import (
    SampleKey,
    SourceOptions,
    check_captions,
    digest_listing,
    load_picture,
    read_file,
)
from prompt_diffusion.data.transforms import decode_image
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import join_uri, list_files, read_bytes

_SHAPE_TOLERANCE = 1.02  # a resized copy's sides are rounded
_BROKEN = "\0broken"  # the column that says why a line of the table is none


class ImageFolderConfig(SourceOptions):
    """A user's own images."""

    kind: Literal["image_folder"] = "image_folder"
    uri: str
    """The folder with the images and `metadata.csv`, `metadata.jsonl` or `metadata.parquet`."""
    condition: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")
    """For pairs: what the source images are, by the name of the vision task's condition. None for single images."""


def _read_csv(data: bytes) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))


def _read_jsonl(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.decode("utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = {_BROKEN: f"line {number} is not JSON: {error}"}
        rows.append(row if isinstance(row, dict) else {_BROKEN: f"line {number} is not a JSON object"})
    return rows


def _read_parquet(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
    return rows


TABLE_READERS: dict[str, Callable[[bytes], list[dict[str, Any]]]] = {
    "metadata.csv": _read_csv,
    "metadata.jsonl": _read_jsonl,
    "metadata.parquet": _read_parquet,
}


class ImageFolderSource:
    """Reads the images that the table lists."""

    def __init__(self, config: ImageFolderConfig, image_size: int | None) -> None:
        self.config, self.image_size = config, image_size
        names = list_files(config.uri)
        tables = [name for name in TABLE_READERS if name in names]
        if len(tables) != 1:
            raise ValueError(
                f"{config.uri} needs one table out of {', '.join(TABLE_READERS)}; it has {', '.join(tables) or 'none'}"
            )
        self.table = tables[0]
        pair = ("source_file_name", "target_file_name")
        self.image_columns: tuple[str, ...] = ("file_name",) if config.condition is None else pair

    def digest(self) -> str:
        """Return a digest of the table, and of the names and sizes of all files."""
        return digest_listing(self.config.uri, read_bytes(join_uri(self.config.uri, self.table)))

    def plan(self) -> list[SampleKey]:
        """Return the rows of the table in its order."""
        keys = []
        for number, row in enumerate(self._rows):
            sample_id = row.get(self.image_columns[-1])
            sample_id = sample_id if isinstance(sample_id, str) and sample_id else f"{self.table}#{number}"
            keys.append(SampleKey(sample_id, str(row.get("group") or sample_id), 0, file=self.table, row=number))
        return _number_members(keys)

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Read the images of each row; what is broken is rejected with its reason."""
        for key in keys:
            try:
                yield self._read_row(key, self._rows[key.row])
            except ValueError as error:
                yield Reject(sample_id=key.sample_id, reason=str(error))

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """Return the table's rows; ValueError where it cannot be understood or lacks a column."""
        uri = join_uri(self.config.uri, self.table)
        try:
            rows = TABLE_READERS[self.table](read_bytes(uri))
        except (csv.Error, UnicodeDecodeError, pa.ArrowException) as error:
            raise ValueError(f"{uri} cannot be read: {error}") from error
        columns = {column for row in rows for column in row if column != _BROKEN}
        missing = [column for column in (*self.image_columns, "caption") if column not in columns]
        if missing:
            found = ", ".join(sorted(map(str, columns))) or "none"
            raise ValueError(f"{uri} has no columns {', '.join(missing)}; it has {found}")
        return rows

    def _read_row(self, key: SampleKey, row: dict[str, Any]) -> ImagePair:
        """Read the images of one row; ValueError says what is wrong with it."""
        if _BROKEN in row:
            raise ValueError(row[_BROKEN])
        caption = check_captions({"caption": row.get("caption")}, needed=("caption",))["caption"]
        names = check_captions({column: row.get(column) for column in self.image_columns}, needed=())
        images, shapes = {}, {}
        for column, name in names.items():
            if not name:
                raise ValueError(f"{column} is missing")
            data = read_file(join_uri(self.config.uri, name), name)
            try:
                images[column] = load_picture(data, self.image_size)
                if self.config.condition is not None:
                    shapes[name] = decode_image(data).shape[:2]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        _check_shapes(shapes)
        image = images[self.image_columns[-1]]
        source = images[self.image_columns[0]]
        return ImagePair(
            sample_id=key.sample_id,
            group_id=key.group_id,
            seed=key.seed,
            input_prompt=caption,
            edit_instruction="",
            edited_prompt=caption,
            input_image=image,
            edited_image=image,
            split=key.split,
            source_uri=key.sample_id,
            exact_maps={self.config.condition: (source, source)} if self.config.condition else {},
        )


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where the images of a pair have different shapes: their centre squares would not show the same."""
    ratios = [width / height for height, width in shapes.values()]
    if ratios and max(ratios) > _SHAPE_TOLERANCE * min(ratios):
        sizes = " and ".join(f"{name} {width} x {height}" for name, (height, width) in shapes.items())
        raise ValueError(f"source and target differ in shape: {sizes} pixels")


def _number_members(keys: list[SampleKey]) -> list[SampleKey]:
    """Give the members of each group their seeds: 0, 1, ... in the order of the table."""
    members: dict[str, int] = {}
    numbered = []
    for key in keys:
        members[key.group_id] = members.get(key.group_id, -1) + 1
        numbered.append(replace(key, seed=members[key.group_id]))
    return numbered
