"""Sealed manifests: a folder of files is finished for good once its ``manifest.parquet``, written last, exists.

``manifest.parquet`` has one row per file (path, rows, bytes, sha256); its schema metadata holds, as one JSON value, the
identity, the counts, the rejects and the library versions, with a digest over all of it.
"""

import binascii
import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_diffusion.store.codec import (
    METADATA_KEY,
    decode_manifest,
    encode_manifest,
    find_versions,
    read_written_types,
)
from prompt_diffusion.store.concurrency import map_ahead
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import StageIdentity, compute_digest
from prompt_diffusion.store.records import DamagedDataError, ManifestRef, Reject, StoredFile, UnsealedError
from prompt_diffusion.store.storage import (
    create_bytes,
    exists,
    list_sizes,
    open_input,
    read_bytes,
    write_bytes,
    write_from,
)
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.parquet"
_READS_AT_ONCE = 16

__all__ = [
    "MANIFEST_NAME",
    "DamagedDataError",
    "Manifest",
    "ManifestRef",
    "Reject",
    "StoredFile",
    "UnsealedError",
    "describe_file",
    "find_sealed",
    "is_sealed",
    "open_manifest",
    "seal_manifest",
    "write_file",
    "write_folder",
]


@dataclass(frozen=True)
class Manifest:
    """A sealed manifest; everything read through it is checked against size, digest and row count."""

    ref: ManifestRef
    identity: StageIdentity
    files: tuple[StoredFile, ...]
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
        content = pa.BufferReader(self.read_file(shard.path))
        file = pq.ParquetFile(content)
        names = file.schema_arrow.names
        unknown = [column for column in columns or [] if column not in names]
        if unknown:
            raise ValueError(f"{self._uri_of(shard.path)} has no column {unknown[0]!r}, only {', '.join(names)}")
        table = file.read(columns=columns)
        if table.num_rows != shard.rows:
            raise _refuse(self.ref.uri, shard.path, f"has {table.num_rows} rows, sealed with {shard.rows}")
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
            raise _refuse(self.ref.uri, shard.path, f"has columns of other types than it says: {types}")
        if table.num_rows != shard.rows:
            raise _refuse(self.ref.uri, shard.path, f"has {table.num_rows} rows, sealed with {shard.rows}")
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
            raise _refuse(self.ref.uri, shard.path, "is missing, though its manifest is sealed") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError, binascii.Error, KeyError) as error:
            # Arrow reports damage by its own exceptions or by a bare OSError without a number.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _refuse(self.ref.uri, shard.path, f"cannot be read: {reason}") from error

    def read_file(self, path: str) -> bytes:
        """Return a file's content; DamagedDataError names a file that is not as sealed."""
        expected = self._find_file(path)
        try:
            data = read_bytes(self._uri_of(path))
        except FileNotFoundError as error:
            raise _refuse(self.ref.uri, path, "is missing, though its manifest is sealed") from error
        self._check(expected, len(data), compute_digest(data))
        return data

    def fetch_folder(self, prefix: str, target: Path) -> Path:
        """Copy the files below ``prefix`` to ``target/{fingerprint}/{prefix}`` and return that folder.

        Each is checked while it is copied, in pieces; what is already there with the right digest is kept.
        """
        prefix = prefix.strip("/")
        wanted = [file for file in self.files if not prefix or file.path.startswith(f"{prefix}/")]
        if not wanted:
            raise ValueError(f"{self.ref.uri} has no files below {prefix!r}")
        folder = target / self.ref.fingerprint
        for file in wanted:
            copy = folder / file.path
            if not copy.is_file() or copy.stat().st_size != file.bytes or digest_file(copy) != file.sha256:
                self._copy_file(file, copy)
        return folder / prefix if prefix else folder

    def _copy_file(self, file: StoredFile, copy: Path) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with open_input(self._uri_of(file.path)) as source, partial.open("xb") as sink:
                while piece := source.read(1 << 22):
                    digest.update(piece)
                    sink.write(piece)
            self._check(file, partial.stat().st_size, digest.hexdigest())
            os.replace(partial, copy)
        except FileNotFoundError as error:
            raise _refuse(self.ref.uri, file.path, "is missing, though its manifest is sealed") from error
        finally:
            partial.unlink(missing_ok=True)

    def _check(self, expected: StoredFile, num_bytes: int, digest: str) -> None:
        if num_bytes != expected.bytes:
            raise _refuse(self.ref.uri, expected.path, f"has {num_bytes} bytes, sealed with {expected.bytes}")
        if digest != expected.sha256:
            raise _refuse(self.ref.uri, expected.path, f"has the digest {digest}, sealed with {expected.sha256}")

    def _find_file(self, path: str) -> StoredFile:
        for file in self.files:
            if file.path == path:
                return file
        raise ValueError(f"{self.ref.uri} has no file {path!r}, only {', '.join(f.path for f in self.files)}")

    def _uri_of(self, path: str) -> str:
        return join_uri(self.ref.uri, path)


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
            raise _refuse(uri, file.path, "is missing, though its manifest is sealed")
        if sizes[file.path] != file.bytes:
            raise _refuse(uri, file.path, f"has {sizes[file.path]} bytes, sealed with {file.bytes}")
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


def seal_manifest(
    identity: StageIdentity,
    store_root: str,
    files: Sequence[StoredFile],
    *,
    counts: Mapping[str, int],
    rejects: Sequence[Reject] = (),
) -> ManifestRef:
    """Write the manifest of finished files, and so end the stage; if another run was first, its manifest counts."""
    uri = identity.uri(store_root)
    sizes = list_sizes(uri)
    for file in files:
        _check_path(uri, file.path)
        if sizes.get(file.path) != file.bytes:
            raise DamagedDataError(
                f"{join_uri(uri, file.path)} has {sizes.get(file.path)} bytes before sealing, not {file.bytes}"
            )
    content = {
        "identity": identity.model_dump(mode="json"),
        "fingerprint": identity.fingerprint,
        "counts": dict(counts),
        "rejects": [reject.model_dump() for reject in rejects],
        "versions": find_versions(),
    }
    rows = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    if create_bytes(join_uri(uri, MANIFEST_NAME), encode_manifest(content, rows)):
        logger.info("sealed %s: %d files, %s", uri, len(files), dict(counts))
    else:
        logger.info("%s was sealed by another run; that manifest counts", uri)
    return open_manifest(uri).ref


def write_file(identity: StageIdentity, store_root: str, path: str, data: bytes, rows: int = 0) -> StoredFile:
    """Write one file of a stage that is not sharded (weights, JSON, a report)."""
    uri = identity.uri(store_root)
    _check_path(uri, path)
    if is_sealed(uri):
        # Another run finished meanwhile: its files are final, and sealing will hand back its manifest.
        logger.info("%s is sealed: %s stays as it is", uri, path)
    else:
        write_bytes(join_uri(uri, path), data)
    return describe_file(path, data, rows)


def write_folder(identity: StageIdentity, store_root: str, prefix: str, folder: Path) -> list[StoredFile]:
    """Write all files of a local folder below ``prefix``, without holding them in memory."""
    uri = identity.uri(store_root)
    sealed = is_sealed(uri)
    files = []
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = str(PurePosixPath(prefix) / source.relative_to(folder).as_posix())
        _check_path(uri, path)
        if not sealed:
            write_from(join_uri(uri, path), source)
        files.append(StoredFile(path, 0, source.stat().st_size, digest_file(source)))
    return files


def describe_file(path: str, data: bytes, rows: int = 0) -> StoredFile:
    """Return size and digest of a content under the path that it has in its manifest."""
    return StoredFile(path=path, rows=rows, bytes=len(data), sha256=compute_digest(data))


def _parse_manifest(uri: str, data: bytes) -> Manifest:
    """Return the manifest of those bytes; DamagedDataError where they are not what was sealed."""
    try:
        content, rows = decode_manifest(data)
        identity = StageIdentity.model_validate(content["identity"])
        rejects = tuple(Reject.model_validate(reject) for reject in content["rejects"])
        files = tuple(StoredFile(**row) for row in rows)
        counts, versions = content["counts"], content["versions"]
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(uri, MANIFEST_NAME, f"cannot be used: {error}") from error
    for file in files:
        _check_path(uri, file.path)
    num_rows = counts["rows"] if "rows" in counts else sum(file.rows for file in files)
    ref = ManifestRef(uri=uri, stage=identity.stage, fingerprint=identity.fingerprint, rows=num_rows)
    return Manifest(ref, identity, files, counts, rejects, versions)


def _refuse(uri: str, path: str, reason: str) -> DamagedDataError:
    """Return the error that names a damaged file of the folder ``uri``, and what to do."""
    way_out = f"delete {join_uri(uri, MANIFEST_NAME)} and run its stage again to make it anew"
    return DamagedDataError(f"{join_uri(uri, path)} {reason}; {way_out}")


def _check_path(uri: str, path: str) -> None:
    """Raise DamagedDataError for a path that leaves the manifest's folder: what is fetched is written under it."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or path == MANIFEST_NAME:
        raise DamagedDataError(f"{uri} cannot hold a file at the path {path!r}")
