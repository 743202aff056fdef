"""InstructPix2Pix as Parquet rows, one pair a row, as the Hugging Face hub has it; read a page at a time.

The rows carry no prompt group: it is the digest of the prompt triple.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.base import SampleKey, check_captions, load_picture
from prompt_diffusion.store.fingerprint import compute_digest, write_canonical_json
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import join_uri, list_sizes, open_input

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("original_prompt", "edit_prompt", "edited_prompt")
IMAGE_COLUMNS = ("original_image", "edited_image")
_BATCH_ROWS = 8
_FOOTER_BYTES = 1 << 16
_UNREADABLE = -1  # the row of a key whose file has no readable footer


class ParquetRowsSource:
    """Every Parquet file below a folder, in the order of their names."""

    def __init__(self, uri: str, num_groups: int | None, image_size: int | None) -> None:
        self.uri, self.num_groups, self.image_size = uri, num_groups, image_size
        found = list_sizes(uri)
        self.sizes = {name: found[name] for name in found if name.endswith(".parquet")}

    def digest(self) -> str:
        """Return a digest of each file's name, size and last 64 KiB, where Parquet keeps offsets and statistics."""
        ends = []
        for name, size in self.sizes.items():
            with open_input(join_uri(self.uri, name)) as file:
                file.seek(max(0, size - _FOOTER_BYTES))
                ends.append([name, size, compute_digest(file.read())])
        return compute_digest(write_canonical_json(ends).encode())

    def plan(self) -> list[SampleKey]:
        """Return the rows of all files, reading their texts only; with `num_groups`, up to the first row beyond them.

        A file that cannot be read stands for as many rejects as it would hold rows, judged by its size.
        """
        keys: list[SampleKey] = []
        members: dict[str, int] = {}
        unreadable: list[tuple[int, str]] = []  # (where its rows would stand, file)
        bytes_read = 0
        for name, size in self.sizes.items():
            try:
                groups = self._read_groups(name)
            except (pa.ArrowException, OSError) as error:
                _raise_unless_damage(error)
                logger.warning("%s cannot be read: %s", join_uri(self.uri, name), error)
                unreadable.append((len(keys), name))
                continue
            for row, group in enumerate(groups):
                if group not in members and len(members) == self.num_groups:
                    return self._insert_unreadable(keys, unreadable, bytes_read + size)
                members[group] = members.get(group, -1) + 1
                keys.append(SampleKey(f"{name}#{row}", group, members[group], file=name, row=row))
            bytes_read += size
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
            missing = [column for column in (*PROMPT_COLUMNS, *IMAGE_COLUMNS) if column not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{join_uri(self.uri, name)} has no columns {', '.join(missing)}; "
                    f"it has {', '.join(file.schema_arrow.names)}"
                )
            for index in range(file.num_row_groups):
                num_rows = file.metadata.row_group(index).num_rows
                try:
                    rows = file.read_row_group(index, columns=list(PROMPT_COLUMNS)).to_pylist()
                except (pa.ArrowException, OSError) as error:  # its rows are read, and rejected, later
                    _raise_unless_damage(error)
                    groups += [f"damaged:{name}:{index}"] * num_rows
                    continue
                groups += [_digest_prompts([row[column] for column in PROMPT_COLUMNS]) for row in rows]
        return groups

    def _insert_unreadable(
        self, keys: list[SampleKey], unreadable: list[tuple[int, str]], bytes_read: int
    ) -> list[SampleKey]:
        """Put keys for the unreadable files in their places, as many as other files of that size have rows."""
        planned = list(keys)
        for place, name in reversed(unreadable):
            num_rows = max(1, round(self.sizes[name] * len(keys) / bytes_read)) if bytes_read else 1
            planned[place:place] = [
                SampleKey(f"{name}#{row}?", f"unreadable:{name}", row, file=name, row=_UNREADABLE)
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
                    for row, content in _iterate_rows(file, index, start, wanted) if wanted else ():
                        yield self._convert(wanted.pop(row), content)
                except (pa.ArrowException, OSError) as error:
                    _raise_unless_damage(error)
                    reason = f"row group {index} of {name} cannot be read: {_first_line(error)}"
                    yield from (Reject(sample_id=key.sample_id, reason=reason) for key in wanted.values())
                start = stop

    def _convert(self, key: SampleKey, row: dict[str, Any]) -> ImagePair | Reject:
        """Return a row as an image pair, or why it is none."""
        try:
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

    def _load_image(self, column: str, value: dict[str, Any] | None) -> bytes:
        """Return an image column's picture; ValueError names the column."""
        if not value or not value.get("bytes"):
            raise ValueError(f"{column} is missing")
        try:
            return load_picture(value["bytes"], self.image_size)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error


def _open_parquet(handle: Any) -> pq.ParquetFile:  # noqa: ANN401 - any seekable binary file
    """Open a file so that images stream page by page; a page, at most a row group, is the least that can be decoded."""
    return pq.ParquetFile(handle, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _iterate_rows(
    file: pq.ParquetFile, index: int, start: int, wanted: dict[int, SampleKey]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row of the file, content) of the wanted rows of a row group that begins at row `start`."""
    last, row = max(wanted), start
    columns = [*PROMPT_COLUMNS, *IMAGE_COLUMNS]
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[index], columns=columns):
        for place in range(batch.num_rows):
            if row + place in wanted:
                yield row + place, batch.slice(place, 1).to_pylist()[0]
        row += batch.num_rows
        if row > last:
            return


def _raise_unless_damage(error: Exception) -> None:
    """Raise what the store, not the file, is to blame for: a lost connection must not become rejects that stay.

    Arrow reports damage by its own exceptions or by a bare OSError; the operating system's and a store's have a number.
    """
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def _digest_prompts(prompts: list[str | None]) -> str:
    return compute_digest(write_canonical_json(prompts).encode())[:16]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
