"""The bytes of ``manifest.parquet``: one row per file, all else as one JSON value in the schema metadata, with a digest."""

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as find_version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_diffusion.store.fingerprint import compute_digest, write_canonical_json

METADATA_KEY = b"prompt_diffusion"
_ARROW_SCHEMA_KEY = b"ARROW:schema"
_FILE_SCHEMA = pa.schema([("path", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])
_RECORDED_PACKAGES = ("prompt-diffusion", "pyarrow", "numpy", "pillow", "torch", "diffusers", "transformers")


def encode_manifest(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the Parquet bytes of a manifest: ``rows`` have path, rows, bytes and sha256; ``content`` is JSON."""
    metadata = write_canonical_json({**content, "digest": _compute_content_digest(content, rows)})
    table = pa.Table.from_pylist(list(rows), schema=_FILE_SCHEMA.with_metadata({METADATA_KEY: metadata.encode()}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def decode_manifest(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return content and rows of a manifest's bytes; ValueError where they are not what was encoded."""
    try:
        table = open_parquet(data).read()
        content = json.loads((table.schema.metadata or {})[METADATA_KEY])
        digest = content.pop("digest")
    except (pa.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"it is no whole manifest ({error})") from error
    rows = table.to_pylist()
    actual = _compute_content_digest(content, rows)
    if digest != actual:
        raise ValueError(f"it was altered: its content has the digest {actual}, it was sealed with {digest}")
    return content, rows


def open_parquet(data: bytes, **options: Any) -> pq.ParquetFile:  # noqa: ANN401 - ParquetFile's own
    """Open the bytes of a Parquet file in memory of Arrow's own.

    A thread of Arrow's may release a file's memory last, when the interpreter has begun to end: with memory of Python's, it
    would abort the process. ``pyarrow.parquet.read_table`` has such threads.
    """
    memory = pa.allocate_buffer(len(data))
    memoryview(memory).cast("B")[:] = data
    return pq.ParquetFile(pa.BufferReader(memory), **options)


def read_written_types(file: pq.ParquetFile) -> dict[str, pa.DataType]:
    """Return the types that a table's columns had when Arrow wrote the file; ValueError or KeyError where it does not say."""
    encoded = (file.metadata.metadata or {})[_ARROW_SCHEMA_KEY]
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded, validate=True)))
    return {field.name: field.type for field in schema}


def find_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape results, without importing them."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = find_version(name)
        except PackageNotFoundError:
            continue
    return versions


def _compute_content_digest(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    return compute_digest(write_canonical_json({**content, "files": [dict(row) for row in rows]}).encode())
