"""Where bytes live: one set of functions for a folder and for S3; the only module that imports fsspec and s3fs.

A URI is a `str`: a local path, `file://...` or `s3://bucket/key`. Any other scheme that fsspec knows (`hf://`,
`https://`) can be read and listed, never written. S3 finds its endpoint and keys in the standard AWS variables
(`AWS_ENDPOINT_URL`).
"""

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

logger = logging.getLogger(__name__)

_NUM_CONFLICT_TRIES = 5
_TEMPORARY_SUFFIX = ".tmp~"


def join_uri(root: str, *parts: str) -> str:
    """Return `root` and the parts joined by single slashes."""
    scheme, separator, rest = root.rpartition("://")
    absolute = "/" if rest.startswith("/") else ""
    stripped = (part.strip("/") for part in (rest, *parts))
    return scheme + separator + absolute + "/".join(part for part in stripped if part)


def local_path(uri: str) -> Path | None:
    """Return the path of a local URI, None for a remote one."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri).expanduser()


def exists(uri: str) -> bool:
    """Say whether a file or a folder lies there."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    filesystem, key = _open_remote(uri)
    try:
        filesystem.info(key)
    except FileNotFoundError:
        return False
    return True


def list_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of every file below a folder, by relative POSIX path, sorted; empty where there is none."""
    path = local_path(uri)
    if path is not None:
        found = _list_folder(path)
    else:
        filesystem, key = _open_remote(uri)
        folder = filesystem._strip_protocol(key).rstrip("/") + "/"
        # A key that ends in a slash is a folder marker of a web console, not a file of ours.
        found = {
            name.removeprefix(folder): int(entry["size"])
            for name, entry in filesystem.find(key, detail=True).items()
            if name.startswith(folder) and not name.endswith("/")
        }
    return {name: found[name] for name in sorted(found) if not name.endswith(_TEMPORARY_SUFFIX)}


def list_files(uri: str) -> list[str]:
    """Return all files below a folder as sorted relative POSIX paths; empty where there is none."""
    return list(list_sizes(uri))


def read_bytes(uri: str) -> bytes:
    """Return the whole of a file; FileNotFoundError names the URI."""
    path = local_path(uri)
    try:
        if path is not None:
            return path.read_bytes()
        filesystem, key = _open_remote(uri)
        return bytes(filesystem.cat_file(key))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {uri}") from error


@contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """Open a file for seekable reading, as `pyarrow.parquet.ParquetFile` needs it; FileNotFoundError names the URI."""
    path = local_path(uri)
    try:
        if path is not None:
            file = path.open("rb")
        else:
            filesystem, key = _open_remote(uri)
            file = filesystem.open(key, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {uri}") from error
    with file:
        yield cast(BinaryIO, file)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically, over what was there; OSError where the store then holds another size."""
    path = local_path(uri)
    if path is not None:
        with _temporary_file(path, data) as temporary:
            temporary.replace(path)
    else:
        filesystem, key = _open_s3(uri)
        filesystem.pipe_file(key, data)
    _check_size(uri, len(data))


def write_from(uri: str, source: Path) -> None:
    """Write a local file to a URI atomically without holding it in memory; OSError where the sizes then differ."""
    path = local_path(uri)
    if path is not None:
        with _temporary_file(path, source) as temporary:
            temporary.replace(path)
    else:
        filesystem, key = _open_s3(uri)
        filesystem.put_file(str(source), key)
    _check_size(uri, source.stat().st_size)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only if nothing lies there, atomically; True if this call, of all that race, created it."""
    path = local_path(uri)
    if path is None:
        created = _create_object(uri, data)
    else:
        with _temporary_file(path, data) as temporary:
            try:
                # A rename would replace silently; a hard link is the atomic "create whole, or not at all" of POSIX.
                path.hardlink_to(temporary)
                created = True
            except FileExistsError:
                created = False
    if created:
        _check_size(uri, len(data))
    return created


def delete_folder(uri: str) -> None:
    """Delete a folder and all below it; nothing happens where there is none."""
    path = local_path(uri)
    if path is not None:
        assert path.resolve() != Path(path.anchor), "never the root of the file system"
        if path.exists():
            shutil.rmtree(path)
        return
    filesystem, key = _open_s3(uri)
    # s3fs would delete the bucket itself with its last key.
    assert "/" in key, f"{uri} is a bucket, not a folder in one"
    names = [f"{key}/{name}" for name in list_files(uri)]
    if names:
        filesystem.rm(names)


def check_writable(root: str) -> None:
    """Write and remove a probe below `root`; ValueError with the URI and the reason where that cannot be done."""
    probe = join_uri(root, f".probe-{uuid.uuid4().hex}")
    failures: tuple[type[Exception], ...] = (OSError, *_list_remote_errors())
    try:
        if local_path(root) is None:
            _check_bucket(root)
        created = create_bytes(probe, b"probe")
        created_again = create_bytes(probe, b"probe")
        _delete_file(probe)
    except ImportError as error:
        raise ValueError(f"cannot write to the store {root}: install the extra 's3' ({error})") from error
    except failures as error:
        raise ValueError(f"cannot write to the store {root}: {_describe_error(error)}") from error
    if not created or created_again:
        logger.warning("the store %s ignores conditional writes: two runs that end at once may both seal", root)


def _open_remote(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system of a remote URI, and the path in it."""
    if uri.startswith("s3://"):
        return _open_s3(uri)
    filesystem, key = fsspec.core.url_to_fs(uri)
    return filesystem, str(key)


def _open_s3(uri: str) -> tuple[Any, str]:
    """Return the S3 file system and `bucket/key`; ValueError for any other scheme, since only these two are written."""
    key = uri.removeprefix("s3://").strip("/")
    if not uri.startswith("s3://") or not key:
        raise ValueError(f"cannot write to {uri}: a store is a folder or s3://bucket/prefix")
    # Listings must not be remembered: other processes write here too.
    return fsspec.filesystem("s3", use_listings_cache=False), key


def _create_object(uri: str, data: bytes) -> bool:
    """Put an object with `If-None-Match: *`; False if another lies there."""
    filesystem, key = _open_s3(uri)
    for attempt in range(_NUM_CONFLICT_TRIES):
        try:
            filesystem.pipe_file(key, data, mode="create")
            return True
        except OSError as error:
            # A lost condition is FileExistsError only where the server's answer names the header, else plain OSError.
            code = _read_error_code(error)
            if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
                return False
            # AWS answers 409 while another conditional write of the same key is in flight: ask again.
            if code != "ConditionalRequestConflict" or attempt == _NUM_CONFLICT_TRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _check_bucket(uri: str) -> None:
    """Raise OSError if the bucket does not exist: some servers create an unknown one on the first write to it."""
    filesystem, key = _open_s3(uri)
    bucket = key.split("/")[0]
    try:
        filesystem.info(bucket)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no bucket {bucket!r}") from error


def _read_error_code(error: BaseException) -> str | None:
    """Return S3's own code of an error that s3fs translated, if it has one."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code")) if isinstance(response, dict) and "Error" in response else None


def _check_size(uri: str, num_bytes: int) -> None:
    """Raise OSError unless the file has that size: an upload can be answered 200 with an error in its body."""
    path = local_path(uri)
    if path is not None:
        stored = path.stat().st_size
    else:
        filesystem, key = _open_s3(uri)
        stored = int(filesystem.info(key)["size"])
    if stored != num_bytes:
        raise OSError(f"{uri} has {stored} bytes after a write of {num_bytes}")


def _list_folder(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below a local folder; what another run takes away meanwhile is left out."""

    def raise_unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for parent, _, names in os.walk(folder, onerror=raise_unless_gone):
        for name in names:
            file = Path(parent, name)
            with suppress(FileNotFoundError):
                found[file.relative_to(folder).as_posix()] = file.stat().st_size
    return found


@contextmanager
def _temporary_file(path: Path, content: bytes | Path) -> Iterator[Path]:
    """Give a file with that content beside `path`, on the disk before it gets its name, and gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            if isinstance(content, Path):
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _delete_file(uri: str) -> None:
    path = local_path(uri)
    if path is not None:
        path.unlink()
    else:
        filesystem, key = _open_s3(uri)
        filesystem.rm_file(key)


def _list_remote_errors() -> tuple[type[Exception], ...]:
    """Return what botocore raises before a server answers (no keys, no endpoint); empty without the extra 's3'."""
    try:
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        return ()
    return (BotoCoreError,)


def _describe_error(error: Exception) -> str:
    """Return the reason of a failed write in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
