"""Sealed manifests: a folder of files is finished for good once its ``manifest.parquet``, written last, exists.

``manifest.parquet`` has one row per file (path, rows, bytes, sha256); its schema metadata holds, as one JSON value, the
identity, the counts, the rejects and the library versions, with a digest over all of it.
"""

import binascii
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_diffusion.store.codec import METADATA_KEY, decode_manifest, open_parquet, read_written_types
from prompt_diffusion.store.concurrency import map_ahead
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.records import DamagedDataError, ManifestRef, Reject, StoredFile, UnsealedError
from prompt_diffusion.store.sealed_files import MANIFEST_NAME, SealedFiles, check_path, refuse
from prompt_diffusion.store.storage import exists, list_sizes, open_input, read_bytes
from prompt_diffusion.store.uris import join_uri

_READS_AT_ONCE = 16

__all__ = [
    "MANIFEST_NAME",
    "DamagedDataError",
    "Manifest",
    "ManifestRef",
    "Reject",
    "StoredFile",
    "UnsealedError",
    "find_sealed",
    "is_sealed",
    "open_manifest",
]


@dataclass(frozen=True)
class Manifest(SealedFiles):
    """A sealed manifest; everything read through it is checked against size, digest and row count."""

    identity: StageIdentity
    counts: dict[str, int]
    rejects: tuple[Reject, ...]
    versions: dict[str, str]

    @property
    def store_root(self) -> str:
        """The store that holds it."""
        return self.ref.uri.removesuffix(f"/{self.ref.stage}/{self.ref.fingerprint}")

    @cached_property
    def shards(self) -> tuple[StoredFile, ...]:
        """The files named ``shard-*.parquet``, in order."""
        return tuple(f for f in self.files if f.path.startswith("shard-") and f.path.endswith(".parquet"))

    def read_table(self, columns: list[str] | None = None) -> pa.Table:
        """Return all shards as one table, in order."""
        if not self.shards:
            raise ValueError(f"{self.ref.uri} has no shards; its files are {', '.join(f.path for f in self.files)}")
        return pa.concat_tables([self.read_shard(shard, columns) for shard in self.shards])

    def read_shard(self, shard: StoredFile, columns: list[str] | None = None) -> pa.Table:
        """Return one shard; DamagedDataError names a file that is not as sealed, ValueError an unknown column."""
        file = open_parquet(self.read_file(shard.path))
        names = file.schema_arrow.names
        unknown = [column for column in columns or [] if column not in names]
        if unknown:
            raise ValueError(f"{self._uri_of(shard.path)} has no column {unknown[0]!r}, only {', '.join(names)}")
        table = file.read(columns=columns)
        if table.num_rows != shard.rows:
            raise refuse(self.ref.uri, shard.path, f"has {table.num_rows} rows, sealed with {shard.rows}")
        # Each shard names itself in its metadata; without that, the shards have one schema.
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != METADATA_KEY}
        return table.replace_schema_metadata(metadata or None)

    def read_index(self, columns: list[str]) -> pa.Table:
        """Return light columns of all shards, in order, without fetching the rest.

        Their pages are checked against the checksums that the shard carries; DamagedDataError names a file that is not whole.
        """
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            return pa.concat_tables(
                map_ahead(pool, lambda s: self.read_columns(s, columns), self.shards, 4 * _READS_AT_ONCE)
            )

    def read_columns(self, shard: StoredFile, columns: list[str]) -> pa.Table:
        """Return light columns of one shard, as ``read_index`` does of all."""
        with self.open_shard(shard) as file:
            table = file.read(columns=columns)
            stated = read_written_types(file)
        # No checksum covers a footer, which says the types twice: once in Parquet's words, once in Arrow's.
        types = {field.name: field.type for field in table.schema}
        if types != {name: stated.get(name) for name in columns}:
            raise refuse(self.ref.uri, shard.path, f"has columns of other types than it says: {types}")
        if table.num_rows != shard.rows:
            raise refuse(self.ref.uri, shard.path, f"has {table.num_rows} rows, sealed with {shard.rows}")
        return table.replace_schema_metadata(None)

    @contextmanager
    def open_shard(self, shard: StoredFile, **options: Any) -> Iterator[pq.ParquetFile]:  # noqa: ANN401 - ParquetFile's own
        """Open a shard to read parts of it in the block, its pages checked; DamagedDataError names one that is not whole.

        Errors of the system and of a store propagate: they are not damage, and may not recur.
        """
        try:
            with open_input(self._uri_of(shard.path)) as source:
                yield pq.ParquetFile(source, page_checksum_verification=True, **{"pre_buffer": True, **options})
        except FileNotFoundError as error:
            raise refuse(self.ref.uri, shard.path, "is missing, though its manifest is sealed") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError, binascii.Error, KeyError) as error:
            # Arrow reports damage by its own exceptions or by a bare OSError without a number.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise refuse(self.ref.uri, shard.path, f"cannot be read: {reason}") from error


def is_sealed(uri: str) -> bool:
    """Say whether the folder has its manifest: finished for good."""
    return exists(join_uri(uri, MANIFEST_NAME))


def open_manifest(uri: str) -> Manifest:
    """Open a sealed folder; UnsealedError without a manifest, DamagedDataError if it or a file's size was changed."""
    try:
        data = read_bytes(join_uri(uri, MANIFEST_NAME))
    except FileNotFoundError as error:
        raise UnsealedError(f"{uri} is not sealed: it has no {MANIFEST_NAME}, so its stage has not finished") from error
    manifest = _parse_manifest(uri, data)
    sizes = list_sizes(uri)
    for file in manifest.files:
        if file.path not in sizes:
            raise refuse(uri, file.path, "is missing, though its manifest is sealed")
        if sizes[file.path] != file.bytes:
            raise refuse(uri, file.path, f"has {sizes[file.path]} bytes, sealed with {file.bytes}")
    return manifest


def find_sealed(identity: StageIdentity, store_root: str) -> ManifestRef | None:
    """Return the sealed output of that identity, None if there is none yet."""
    uri = identity.uri(store_root)
    if not is_sealed(uri):
        return None
    ref = open_manifest(uri).ref
    if ref.fingerprint != identity.fingerprint:
        raise DamagedDataError(f"{uri} holds the manifest of {ref.fingerprint}, not of {identity.fingerprint}")
    return ref


def _parse_manifest(uri: str, data: bytes) -> Manifest:
    """Return the manifest of those bytes; DamagedDataError where they are not what was sealed."""
    try:
        content, rows = decode_manifest(data)
        identity = StageIdentity.model_validate(content["identity"])
        rejects = tuple(Reject.model_validate(reject) for reject in content["rejects"])
        files = tuple(StoredFile(**row) for row in rows)
        counts, versions = content["counts"], content["versions"]
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(uri, MANIFEST_NAME, f"cannot be used: {error}") from error
    for file in files:
        check_path(uri, file.path)
    num_rows = counts["rows"] if "rows" in counts else sum(file.rows for file in files)
    ref = ManifestRef(uri=uri, stage=identity.stage, fingerprint=identity.fingerprint, rows=num_rows)
    return Manifest(ref, files, identity, counts, rejects, versions)
