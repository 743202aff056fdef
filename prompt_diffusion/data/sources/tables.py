"""A user's table of images, ``metadata.csv``, ``.jsonl`` or ``.parquet``: its rows, with their places and problems."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from prompt_diffusion.store.codec import open_parquet


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row."""

    place: str
    """Its position: ``line 3`` of a text, ``row 2`` of a Parquet file, counted from 1."""
    values: dict[str, Any]
    """Its cells by column."""
    problem: str = ""
    """Why it is not a row."""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def decode_text(data: bytes) -> str:
    """Return UTF-8 with or without a byte order mark as text; ValueError with the line, and what the encoding might be."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:1000].count(0) > len(data[:1000]) // 4:
        raise ValueError("it is UTF-16, not UTF-8: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(
            f"line {line} is not UTF-8 (it has the byte 0x{byte:02x}), it may be Windows-1252: save it as UTF-8"
        ) from error


def quote_names(names: Sequence[object]) -> str:
    """Return names for a message, quoting those that are not plain words."""
    texts = [str(name) for name in names]
    return ", ".join(text if text.isidentifier() else repr(text) for text in texts) or "none"


def read_csv(data: bytes, columns: Sequence[str]) -> Table:
    """Read comma-separated values, whose first line names the columns; ValueError with the line where they break off."""
    reader = csv.reader(io.StringIO(decode_text(data), newline=""), strict=True)
    header: tuple[str, ...] = ()
    rows = []
    line = 1
    try:
        for cells in reader:
            place, line = f"line {line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _check_header(cells, columns)
                continue
            problem = ""
            if len(cells) > len(header):
                problem = f"{place} has {len(cells)} cells, the header {len(header)}: put the caption in quotes"
            rows.append(TableRow(place, dict(zip(header, cells, strict=False)), problem))
    except csv.Error as error:
        raise ValueError(f"line {line}: {error} (is a quote open, or single inside quotes? write it twice)") from error
    return Table(header, tuple(rows))


def _check_header(cells: list[str], columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns' names; ValueError where one occurs twice, or another separator than the comma is used."""
    twice = [name for place, name in enumerate(cells) if name in cells[:place] and name in columns]
    if twice:
        raise ValueError(f"line 1 names the column {twice[0]!r} twice")
    for separator, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(cells) == 1 and separator in cells[0]:
            raise ValueError(f"its cells are separated by {word}: separate them by commas")
    return tuple(cells)


def read_jsonl(data: bytes, columns: Sequence[str]) -> Table:
    r"""Read one JSON object a line, ended by \n with or without \r; any other line is a row with a problem."""
    text = decode_text(data)
    if text.lstrip().startswith("["):
        raise ValueError("it is a JSON array: write one object a line, without brackets and commas around them")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_read_object(f"line {number}", line))
    if rows and all(row.problem for row in rows):
        raise ValueError(f"no line of it is a JSON object, as one a line is needed: {rows[0].problem}")
    found = dict.fromkeys(name for row in rows for name in row.values)
    return Table(tuple(found), tuple(rows))


def _read_object(place: str, line: str) -> TableRow:
    repeated: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for number, name in enumerate(names) if name in names[:number])
        return dict(pairs)

    try:
        content = json.loads(line, object_pairs_hook=build)
    except (ValueError, RecursionError) as error:
        return TableRow(place, {}, f"{place} is not JSON: {error}")
    if not isinstance(content, dict):
        return TableRow(place, {}, f"{place} is not a JSON object")
    return TableRow(place, content, f"{place} names {repeated[0]!r} twice" if repeated else "")


def read_parquet(data: bytes, columns: Sequence[str]) -> Table:
    """Read the named columns of a Parquet file: others may be of types that Python has no values for."""
    file = open_parquet(data)
    names = tuple(file.schema_arrow.names)
    found = [name for name in columns if name in names]
    table = file.read(columns=found)
    cells = {name: read_cells(table.column(name)) for name in found}
    rows = [
        TableRow(f"row {number + 1}", {name: cells[name][number] for name in found})
        for number in range(file.metadata.num_rows)
    ]
    return Table(names, tuple(rows))


def read_cells(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; a text that is not UTF-8 as its bytes."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [read_cell(cell) for cell in column]
    return values


def read_cell(cell: pa.Scalar) -> Any:  # noqa: ANN401 - any cell
    """Return the value of one cell; a text that is not UTF-8 as its bytes."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes() if hasattr(cell, "as_buffer") else b"\xff"


ReadTable = Callable[[bytes, Sequence[str]], Table]

TABLE_READERS: dict[str, ReadTable] = {
    "metadata.csv": read_csv,
    "metadata.jsonl": read_jsonl,
    "metadata.parquet": read_parquet,
}
