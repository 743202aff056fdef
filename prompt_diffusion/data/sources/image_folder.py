"""The ``image_folder`` source: a user's own images with captions, or (source, target) pairs of a user's own vision task.

A table beside the images lists them, named as Hugging Face's image folders name it: ``metadata.csv``, ``metadata.jsonl`` or
``metadata.parquet``, with the columns ``file_name`` and ``caption``; for pairs ``source_file_name``, ``target_file_name`` and
``caption``. A row is a sample: an image may have several captions, a target several sources. A column ``group`` may join rows
into prompt groups, a column ``split`` say where they belong. One image stands on both sides of its record.
"""

import logging
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from prompt_diffusion.data.records import ImagePair, Split
from prompt_diffusion.data.sources.base import (
    PublishedSplits,
    SampleKey,
    SourceOptions,
    check_captions,
    find_split,
    load_picture,
    read_file,
    read_text,
    write_safely,
)
from prompt_diffusion.data.sources.digest import digest_files
from prompt_diffusion.data.sources.tables import TABLE_READERS, Table, TableRow, quote_names
from prompt_diffusion.data.transforms import WHITE_16_BIT, Pixels, decode_image
from prompt_diffusion.image_files import open_image
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import exists, find_facts, list_files, read_bytes
from prompt_diffusion.store.uris import join_uri, local_path

logger = logging.getLogger(__name__)

_SHAPE_TOLERANCE = 1.02  # a resized copy's sides are rounded
_ALMOST_BLACK = 48  # of 255: what 16-bit depth in millimetres reaches at 12 m


class ImageFolderConfig(SourceOptions):
    """A user's own images."""

    kind: Literal["image_folder"] = "image_folder"
    uri: str
    """The folder with the images and ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet``."""
    condition: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")
    """For pairs: what the source images are, by the name of the vision task's condition. None for single images."""
    image_column: str = "file_name"
    """The table's column of single images."""
    source_column: str = "source_file_name"
    """The table's column of pairs' source images."""
    target_column: str = "target_file_name"
    """The table's column of pairs' target images."""
    caption_column: str = "caption"
    """The table's column of texts."""
    group_column: str = "group"
    """The table's column of prompt groups, if it has one."""
    published_splits: PublishedSplits = "keep"
    """What to do with a column ``split`` (train, validation, test): keep its splits, or ignore it and split anew."""
    white_16_bit: int = Field(default=WHITE_16_BIT, ge=1, le=WHITE_16_BIT)
    """The 16-bit grey value that becomes white. 65535 is the formats' own; depth in millimetres needs its range: 10000."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns of file names, that of the target last."""
        return (self.image_column,) if self.condition is None else (self.source_column, self.target_column)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read if present."""
        return (*self.image_columns, self.caption_column, self.group_column, "split")


class ImageFolderSource:
    """Reads the images that the table lists."""

    def __init__(self, config: ImageFolderConfig, image_size: int | None) -> None:
        self.config, self.image_size = config, image_size
        tables = [name for name in TABLE_READERS if find_facts(join_uri(config.uri, name)) is not None]
        if len(tables) != 1:
            raise ValueError(_explain_tables(config.uri, tables))
        self.table = tables[0]
        self._has_warned = False

    def digest(self) -> str:
        """Return a digest of the table and of the images that it names."""
        columns = self.config.image_columns
        names = [name for row in self._table.rows for column in columns if (name := _read_name(row, column))]
        return digest_files(self.config.uri, names, self._data)

    def plan(self) -> list[SampleKey]:
        """Return the rows of the table in its order; a row that repeats an earlier one is a reject."""
        keys: list[SampleKey] = []
        taken: set[str] = set()
        first_places: dict[str, str] = {}
        members: dict[str, int] = {}
        has_splits = self.config.published_splits == "keep" and "split" in self._table.columns
        for number, row in enumerate(self._table.rows):
            name = _read_name(row, self.config.image_columns[-1])
            sample_id = write_safely(name) or f"{self.table}#{number}"
            key = SampleKey(sample_id, "", 0, file=self.table, row=number)
            group, published, reject = "", None, ""
            try:
                self._read_texts(row)
                group, published = self._read_group(row), _read_split(row) if has_splits else None
                first = first_places.setdefault(repr([row.values.get(name) for name in self.config.columns]), row.place)
                if first != row.place:
                    reject = f"it is listed twice in {self.table}: {first} and {row.place}"
            except ValueError as error:
                reject = str(error)
            if not reject:
                key = replace(key, sample_id=f"{sample_id}#{number}") if sample_id in taken else key
                taken.add(key.sample_id)
            # Rows of one image are one group: else it would be trained on under one caption, and tested under another.
            group = group or posixpath.normpath(write_safely(name) or key.sample_id)
            members[group] = members.get(group, -1) + 1
            keys.append(replace(key, group_id=group, seed=members[group], published=published, reject=reject))
        return keys

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Read the images of each row; what is broken is rejected with its reason."""
        for key in keys:
            try:
                if key.reject:
                    raise ValueError(key.reject)
                yield self._read_row(key, self._table.rows[key.row])
            except ValueError as error:
                yield Reject(sample_id=key.sample_id, reason=write_safely(str(error)))

    @cached_property
    def _data(self) -> bytes:
        return read_bytes(join_uri(self.config.uri, self.table))

    @cached_property
    def _table(self) -> Table:
        """Return the table; ValueError where it cannot be understood, lacks a column or has no rows."""
        uri, config, data = join_uri(self.config.uri, self.table), self.config, self._data
        try:
            table = TABLE_READERS[self.table](data, config.columns)
        except (ValueError, pa.ArrowException, OSError) as error:
            raise ValueError(f"{uri} cannot be read: {' '.join(str(error).split())}") from error
        if not table.columns:
            raise ValueError(f"{uri} is empty")
        needed = [*config.image_columns, config.caption_column]
        if config.group_column != type(config).model_fields["group_column"].default:
            needed.append(config.group_column)
        missing = [name for name in needed if name not in table.columns]
        if missing:
            fields = {getattr(config, field): field for field in type(config).model_fields if field.endswith("_column")}
            raise ValueError(
                f"{uri} has no columns {quote_names(missing)}; it has {quote_names(sorted(table.columns))}: rename them, or "
                f"say which they are with {', '.join(f'ingest.source.{fields[name]}' for name in missing)}"
            )
        return table

    def _read_texts(self, row: TableRow) -> dict[str, str]:
        """Return caption and file names of a row by column; ValueError says what is wrong with them."""
        if row.problem:
            raise ValueError(row.problem)
        caption = self.config.caption_column
        texts = check_captions({caption: row.values.get(caption)}, needed=(caption,))
        for column in self.config.image_columns:
            texts[column] = read_text(column, row.values.get(column))
            if not texts[column]:
                raise ValueError(f"{column} is missing")
        return texts

    def _read_group(self, row: TableRow) -> str:
        """Return the prompt group that a row names, "" for none: None, an empty text and NaN mean none, 0 is a group."""
        group = row.values.get(self.config.group_column)
        if group is None or group != group:  # NaN
            return ""
        if isinstance(group, str | bytes | list | dict):
            return read_text(self.config.group_column, group)
        return str(group)

    def _read_row(self, key: SampleKey, row: TableRow) -> ImagePair:
        """Read the images of one row; ValueError says what is wrong with it."""
        config, texts = self.config, self._read_texts(row)
        caption = texts[config.caption_column]
        images, shapes = {}, {}
        for column in config.image_columns:
            name = texts[column]
            data = read_file(config.uri, name)
            try:
                images[column] = load_picture(data, self.image_size, config.white_16_bit)
                pixels = decode_image(data, config.white_16_bit)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            shapes[name] = pixels.shape[:2]
            self._warn_of_black(name, data, pixels)
        _check_shapes(shapes)
        image = images[config.image_columns[-1]]
        source = images[config.image_columns[0]]
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
            exact_maps={config.condition: (source, source)} if config.condition else {},
        )

    def _warn_of_black(self, name: str, data: bytes, pixels: Pixels) -> None:
        """Warn once that a 16-bit image is almost black: its values are likely to be millimetres."""
        if self._has_warned or pixels.max(initial=0) >= _ALMOST_BLACK:
            return
        with open_image(data) as image:
            if not image.mode.startswith("I"):
                return
        self._has_warned = True
        logger.warning(
            "%s has 16-bit grey values, of which %d is white, and becomes almost black: if they are millimetres or the like, "
            "say which value is white with ingest.source.white_16_bit",
            name,
            self.config.white_16_bit,
        )


def _explain_tables(uri: str, tables: list[str]) -> str:
    """Return what is wrong where there is not exactly one table."""
    path = local_path(uri)
    if path is not None and path.is_file():
        return f"{uri} is a file: name the folder that it lies in"
    needed = f"{uri} needs one table out of {', '.join(TABLE_READERS)}"
    if not tables and not exists(uri):
        return f"{needed}: there is no folder {uri}"
    needed += f"; it has {', '.join(tables) or 'none'}"
    others = [name for name in list_files(uri) if name.endswith((".csv", ".jsonl", ".parquet", ".json", ".tsv"))]
    return needed if tables or not others else f"{needed}, but there is {', '.join(map(repr, others[:3]))}"


def _read_name(row: TableRow, column: str) -> str:
    """Return a file name of a row, "" where there is none: problems are reported when it is read."""
    name: Any = row.values.get(column)
    return name.strip() if isinstance(name, str) else ""


def _read_split(row: TableRow) -> Split:
    """Return the split that a row names; train where it names none."""
    name = read_text("split", row.values.get("split"))
    split = find_split(name) if name else "train"
    if split is None:
        raise ValueError(f"split is {name!r}: name train, validation or test")
    return split


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where the images of a pair have different shapes: their centre squares would not show the same."""
    ratios = [width / height for height, width in shapes.values()]
    if ratios and max(ratios) > _SHAPE_TOLERANCE * min(ratios):
        sizes = " and ".join(f"{name} {width} x {height}" for name, (height, width) in shapes.items())
        raise ValueError(f"source and target differ in shape: {sizes} pixels")
