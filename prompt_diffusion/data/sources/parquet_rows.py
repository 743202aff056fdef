"""InstructPix2Pix as Parquet rows, one pair per row, as the Hugging Face hub has it; read a page at a time.

The rows carry no prompt group: it is the digest of the prompt triple.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_diffusion.data.records import SPLITS, ImagePair, Split
from prompt_diffusion.data.sources.base import PublishedSplits, SampleKey, check_captions, find_split, load_picture
from prompt_diffusion.data.sources.digest import digest_files
from prompt_diffusion.data.sources.tables import quote_names, read_cell, read_cells
from prompt_diffusion.store.fingerprint import compute_digest, write_canonical_json
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import list_sizes, open_input
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("original_prompt", "edit_prompt", "edited_prompt")
IMAGE_COLUMNS = ("original_image", "edited_image")
_BATCH_ROWS = 8
_FOOTER_BYTES = 1 << 16
_UNREADABLE = -1  # the row of a key whose file has no readable footer


class ParquetRowsSource:
    """Every Parquet file below a folder: by their published splits, training first, then in the order of their names."""

    def __init__(
        self,
        uri: str,
        num_groups: int | None,
        image_size: int | None,
        published_splits: PublishedSplits = "keep",
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """Take ``columns``, the files' names by ours where they differ; ValueError for a name that is not one of ours."""
        self.uri, self.num_groups, self.image_size = uri, num_groups, image_size
        self.names = {name: (columns or {}).get(name, name) for name in (*PROMPT_COLUMNS, *IMAGE_COLUMNS)}
        unknown = [name for name in columns or {} if name not in self.names]
        if unknown:
            raise ValueError(f"ingest.source.columns names {', '.join(unknown)}; there are {', '.join(self.names)}")
        self.sizes = find_parquet_files(uri)
        splits = {name: find_published_split(name) for name in self.sizes}
        self.order = sorted(self.sizes, key=lambda name: (SPLITS.index(splits[name] or "train"), name))
        # Training files alone, as the public data set has them, say nothing of the other splits.
        keeps = published_splits == "keep" and any(split not in (None, "train") for split in splits.values())
        self.splits: dict[str, Split | None] = {
            name: (split or "train") if keeps else None for name, split in splits.items()
        }

    def digest(self) -> str:
        """Return a digest of the files; of a large set by name, size and last 64 KiB, where Parquet keeps its offsets."""
        return digest_files(self.uri, self.sizes, ends=dict.fromkeys(self.sizes, _FOOTER_BYTES))

    def plan(self) -> list[SampleKey]:
        """Return the rows of all files, reading their texts only; with ``num_groups``, of each published split up to the
        first row beyond them.

        A file that cannot be read counts as as many rejects as it would have rows, judged by its size.
        """
        keys: list[SampleKey] = []
        members: dict[str, int] = {}
        groups: dict[Split | None, set[str]] = {split: set() for split in self.splits.values()}
        full: set[Split | None] = set()
        unreadable: list[tuple[int, str]] = []  # (where its rows would stand, file)
        bytes_read = 0
        for name in self.order:
            split = self.splits[name]
            if split in full:
                continue
            try:
                found = self._read_groups(name)
            except (pa.ArrowException, OSError) as error:
                _raise_unless_damage(error)
                logger.warning("%s cannot be read: %s", join_uri(self.uri, name), error)
                unreadable.append((len(keys), name))
                continue
            bytes_read += self.sizes[name]
            for row, group in enumerate(found):
                if group not in groups[split] and len(groups[split]) == self.num_groups:
                    full.add(split)
                    break
                groups[split].add(group)
                members[group] = members.get(group, -1) + 1
                keys.append(SampleKey(f"{name}#{row}", group, members[group], file=name, row=row, published=split))
        return self._insert_unreadable(keys, unreadable, bytes_read)

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Read each row; what is broken is rejected with its reason."""
        for name, members in groupby(keys, key=lambda key: key.file):
            wanted = list(members)
            if wanted[0].row == _UNREADABLE:
                reason = f"{name} is not a readable Parquet file, and is counted as {len(wanted)} rows by its size"
                yield from (Reject(sample_id=key.sample_id, reason=reason) for key in wanted)
            else:
                yield from self._read_rows(name, wanted)

    def _read_groups(self, name: str) -> list[str]:
        """Return the prompt group of each row; rows of a damaged row group are a group of their own."""
        groups: list[str] = []
        with open_input(join_uri(self.uri, name)) as handle:
            file = _open_parquet(handle)
            self._check_columns(name, file.schema_arrow)
            for index in range(file.num_row_groups):
                num_rows = file.metadata.row_group(index).num_rows
                try:
                    names = [self.names[column] for column in PROMPT_COLUMNS]
                    table = file.read_row_group(index, columns=names)
                    prompts = zip(*(read_cells(table.column(column)) for column in names), strict=True)
                except (pa.ArrowException, OSError) as error:  # its rows are read, and rejected, later
                    _raise_unless_damage(error)
                    groups += [f"damaged:{name}:{index}"] * num_rows
                    continue
                groups += map(_digest_prompts, prompts)
        return groups

    def _check_columns(self, name: str, schema: pa.Schema) -> None:
        """Raise ValueError, one sentence, where a file lacks a column or an image column can hold no pictures."""
        missing = [column for column in self.names.values() if column not in schema.names]
        if missing:
            raise ValueError(
                f"{join_uri(self.uri, name)} has no columns {quote_names(missing)}; it has {quote_names(schema.names)}: "
                "say which they are with ingest.source.columns"
            )
        for column in IMAGE_COLUMNS:
            kind = schema.field(self.names[column]).type
            if not _can_hold_pictures(kind):
                raise ValueError(
                    f"the column {self.names[column]!r} of {join_uri(self.uri, name)} holds {kind}, not pictures: they are "
                    "image files as binary, or as struct<bytes, path>"
                )

    def _insert_unreadable(
        self, keys: list[SampleKey], unreadable: list[tuple[int, str]], bytes_read: int
    ) -> list[SampleKey]:
        """Put keys for the unreadable files in their places, as many as other files of that size have rows."""
        planned = list(keys)
        for place, name in reversed(unreadable):
            num_rows = max(1, round(self.sizes[name] * len(keys) / bytes_read)) if bytes_read else 1
            planned[place:place] = [
                SampleKey(
                    f"{name}#{row}?", f"unreadable:{name}", row, file=name, row=_UNREADABLE, published=self.splits[name]
                )
                for row in range(num_rows)
            ]
        return planned

    def _read_rows(self, name: str, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Read the keys of one file, row group by row group; a damaged one rejects its own rows only."""
        with open_input(join_uri(self.uri, name)) as handle:
            file = _open_parquet(handle)
            start = 0
            for index in range(file.num_row_groups):
                stop = start + file.metadata.row_group(index).num_rows
                wanted = {key.row: key for key in keys if start <= key.row < stop}
                try:
                    for row, content in self._iterate_rows(file, index, start, wanted) if wanted else ():
                        yield self._convert(wanted.pop(row), content)
                except (pa.ArrowException, OSError) as error:
                    _raise_unless_damage(error)
                    reason = f"row group {index} of {name} cannot be read: {_first_line(error)}"
                    yield from (Reject(sample_id=key.sample_id, reason=reason) for key in wanted.values())
                start = stop

    def _iterate_rows(
        self, file: pq.ParquetFile, index: int, start: int, wanted: dict[int, SampleKey]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row of the file, content) of the wanted rows of a row group that begins at row ``start``."""
        last, row = max(wanted), start
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[index], columns=list(self.names.values())):
            for place in range(batch.num_rows):
                if row + place in wanted:
                    cells = {column: read_cell(batch.column(name)[place]) for column, name in self.names.items()}
                    yield row + place, cells
            row += batch.num_rows
            if row > last:
                return

    def _convert(self, key: SampleKey, row: dict[str, Any]) -> ImagePair | Reject:
        """Return a row as an image pair, or why it is not one."""
        try:
            if key.reject:
                raise ValueError(key.reject)
            prompts = check_captions(
                {column: row[column] for column in PROMPT_COLUMNS}, needed=("original_prompt", "edited_prompt")
            )
            images = [self._load_image(column, row[column]) for column in IMAGE_COLUMNS]
        except ValueError as error:
            return Reject(sample_id=key.sample_id, reason=str(error))
        return ImagePair(
            sample_id=key.sample_id,
            group_id=key.group_id,
            seed=key.seed,
            input_prompt=prompts["original_prompt"],
            edit_instruction=prompts["edit_prompt"],
            edited_prompt=prompts["edited_prompt"],
            input_image=images[0],
            edited_image=images[1],
            split=key.split,
            source_uri=key.sample_id,
        )

    def _load_image(self, column: str, value: Any) -> bytes:  # noqa: ANN401 - any cell
        """Return an image column's picture; ValueError names the column."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise ValueError(f"{column} is missing")
        try:
            return load_picture(bytes(data), self.image_size)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error


def find_parquet_files(uri: str) -> dict[str, int]:
    """Return the bytes of each Parquet file below a folder by its name; names that begin with a dot are skipped."""
    return {
        name: size
        for name, size in list_sizes(uri).items()
        if name.endswith(".parquet") and not any(part.startswith(".") for part in name.split("/"))
    }


def find_published_split(name: str) -> Split | None:
    """Return the split that a file's name says, or else its nearest folder: ``test/0.parquet``, ``data/val-0.parquet``."""
    parts = reversed(name.removesuffix(".parquet").split("/"))
    return next((split for split in map(find_split, parts) if split is not None), None)


def _can_hold_pictures(kind: pa.DataType) -> bool:
    """Say whether a column can hold image files' bytes, or structs with them; one of nulls alone can, too."""
    types = pa.types
    if types.is_struct(kind):
        return "bytes" in [field.name for field in kind] and _can_hold_pictures(kind.field("bytes").type)
    return any(
        check(kind)
        for check in (
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
            types.is_null,
        )
    )


def _open_parquet(handle: Any) -> pq.ParquetFile:  # noqa: ANN401 - any seekable binary file
    """Open a file so that images stream page by page; a page, at most a row group, is the least that can be decoded."""
    return pq.ParquetFile(handle, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _raise_unless_damage(error: Exception) -> None:
    """Raise errors that are the store's fault, not the file's: a lost connection must not become permanent rejects.

    Arrow reports damage by its own exceptions or by a bare OSError; the operating system's and a store's have a number.
    """
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def _digest_prompts(prompts: Iterable[Any]) -> str:
    """Return the prompt group of a row's texts; one that is not text, whose row is rejected, enters by its value."""
    texts = [prompt if isinstance(prompt, str) else _describe_odd(prompt) for prompt in prompts]
    return compute_digest(write_canonical_json(texts).encode())[:16]


def _describe_odd(prompt: object) -> str | None:
    if isinstance(prompt, bytes):
        return prompt.decode(errors="backslashreplace")
    return None if prompt is None else repr(prompt)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
