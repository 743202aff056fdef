"""Where bytes live: one set of functions for a folder and for S3; the only module that imports fsspec and s3fs.

A URI is a ``str``: a local path, ``file://...`` or ``s3://bucket/key``. Any other scheme that fsspec knows (``hf://``,
``https://``) can be read and listed, never written. S3 finds its endpoint and keys in the standard AWS variables
(``AWS_ENDPOINT_URL``). A store that fails is retried as ``retries.py`` says, then StoreError names the URI and the reason.
"""

import logging
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from prompt_diffusion.store.local_files import TEMPORARY_SUFFIX, list_folder, temporary_file
from prompt_diffusion.store.retries import (
    StoreError,
    ask_store,
    build_client_config,
    describe_error,
    upload_until_stored,
)

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_MARK_NAME = "upload"


def join_uri(root: str, *parts: str) -> str:
    """Return ``root`` and the parts joined by single slashes."""
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
        _ask(uri, "look up", lambda: filesystem.info(key))
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a store says of a file without its content."""

    size: int | None
    """Bytes; None where the store does not say."""
    md5: str | None = None
    """MD5 of the content, 32 hex digits, where the store keeps it: S3 does for what was uploaded in one piece."""


def list_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of every file below a folder, by relative POSIX path, sorted; empty where there is none.

    ValueError names a file whose size a web server does not tell.
    """
    sizes = {}
    for name, facts in list_facts(uri).items():
        if facts.size is None:
            facts = find_facts(join_uri(uri, name)) or facts
        if facts.size is None:
            raise ValueError(f"{uri} does not say how large {name} is: copy the data to a folder or to S3")
        sizes[name] = facts.size
    return sizes


def list_facts(uri: str) -> dict[str, FileFacts]:
    """Return what the store says of every file below a folder, by relative POSIX path, sorted; empty where there is none."""
    path = local_path(uri)
    if path is not None:
        found = {name: FileFacts(size) for name, size in list_folder(path).items()}
    else:
        filesystem, key = _open_remote(uri)
        folder = filesystem._strip_protocol(key).rstrip("/") + "/"
        # A key that ends in a slash is a folder marker of a web console, not a file of ours.
        found = {
            name.removeprefix(folder): _read_facts(uri, entry)
            for name, entry in _ask(uri, "list", lambda: filesystem.find(key, detail=True)).items()
            if name.startswith(folder) and not name.endswith("/")
        }
    return {name: found[name] for name in sorted(found) if not name.endswith(TEMPORARY_SUFFIX)}


def find_facts(uri: str) -> FileFacts | None:
    """Return what the store says of one file, links followed; None where no file of that name is there or can be."""
    path = local_path(uri)
    if path is not None:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        return FileFacts(status.st_size) if stat.S_ISREG(status.st_mode) else None
    filesystem, key = _open_remote(uri)
    try:
        entry = _ask(uri, "look up", lambda: filesystem.info(key))
    except FileNotFoundError:
        return None
    return _read_facts(uri, entry) if entry["type"] == "file" else None


def _read_facts(uri: str, entry: dict[str, Any]) -> FileFacts:
    tag = str(entry.get("ETag", "")).strip('"')
    has_md5 = uri.startswith("s3://") and re.fullmatch("[0-9a-f]{32}", tag)
    return FileFacts(None if entry["size"] is None else int(entry["size"]), tag if has_md5 else None)


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
        return bytes(_ask(uri, "read", lambda: filesystem.cat_file(key)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {uri}") from error


@contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """Open a file for seekable reading, as ``pyarrow.parquet.ParquetFile`` needs it; FileNotFoundError names the URI."""
    path = local_path(uri)
    try:
        file = path.open("rb") if path is not None else _open_remote_file(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {uri}") from error
    with file:
        yield cast(BinaryIO, file)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically, over what was there; OSError where the store then holds something else."""
    path = local_path(uri)
    if path is None:
        _upload(uri, len(data), lambda filesystem, key, options: filesystem.pipe_file(key, data, **options))
    else:
        with temporary_file(path, data) as temporary:
            temporary.replace(path)


def write_from(uri: str, source: Path) -> None:
    """Write a local file to a URI atomically without holding it in memory; OSError as ``write_bytes`` raises it."""
    path = local_path(uri)
    if path is None:
        num_bytes = source.stat().st_size
        _upload(uri, num_bytes, lambda filesystem, key, options: filesystem.put_file(str(source), key, **options))
    else:
        with temporary_file(path, source) as temporary:
            temporary.replace(path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only if nothing lies there, atomically; True if this call, of all that race, created it.

    That holds even where the answer of the creating request is lost and its retry finds the file in place.
    """
    path = local_path(uri)
    if path is None:
        return _upload(
            uri, len(data), lambda filesystem, key, options: filesystem.pipe_file(key, data, mode="create", **options)
        )
    with temporary_file(path, data) as temporary:
        try:
            # A rename would replace silently; a hard link is the atomic "create whole, or not at all" of POSIX.
            path.hardlink_to(temporary)
        except FileExistsError:
            # NFS sends a link again when its answer is lost, and then meets its own: link(2) says to count the links.
            return temporary.stat().st_nlink > 1
    return True


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
        _ask(uri, "delete", lambda: filesystem.rm(names))
        # S3 says 200 to a bulk delete that failed for some keys, and s3fs does not look.
        left = {f"{key}/{name}" for name in list_files(uri)} & set(names)
        if left:
            raise StoreError(f"cannot delete {uri}: {len(left)} of {len(names)} files are still there")


def check_writable(root: str) -> None:
    """Write and remove a probe below ``root``; ValueError with the URI and the reason where that cannot be done."""
    probe = join_uri(root, f".probe-{uuid.uuid4().hex}")
    try:
        if local_path(root) is None:
            _check_bucket(root)
        created = create_bytes(probe, b"probe")
        created_again = create_bytes(probe, b"probe")
        delete_file(probe)
    except ImportError as error:
        raise ValueError(f"cannot write to the store {root}: install the extra 's3' ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot write to the store {root}: {describe_error(error.__cause__ or error)}") from error
    if not created or created_again:
        logger.warning("the store %s ignores conditional writes: two runs that end at once may both seal", root)


def _open_remote(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system of a remote URI, and the path in it; ValueError where the scheme's package is missing."""
    try:
        if uri.startswith("s3://"):
            return _open_s3(uri)
        filesystem, key = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise ValueError(f"cannot read {uri}: {describe_error(error)}") from error
    except ValueError as error:  # an unknown scheme, which fsspec names without the address
        raise ValueError(str(error) if uri in str(error) else f"cannot read {uri}: {error}") from error
    return filesystem, str(key)


def _open_s3(uri: str) -> tuple[Any, str]:
    """Return the S3 file system and ``bucket/key``; ValueError for any other scheme, since only these two are written."""
    key = uri.removeprefix("s3://").strip("/")
    if not uri.startswith("s3://") or not key:
        raise ValueError(f"cannot write to {uri}: a store is a folder or s3://bucket/prefix")
    # Listings must not be remembered: other processes write here too.
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=build_client_config())
    # Its own retries would multiply botocore's: 5 times as many requests before a write fails, 25 times for a read.
    filesystem.retries = 1
    return filesystem, key


def _open_remote_file(uri: str) -> Any:  # noqa: ANN401
    """Return an open file of a remote URI; on S3 every range that is read of it is asked for as a whole file is."""
    filesystem, key = _open_remote(uri)
    file = _ask(uri, "read", lambda: filesystem.open(key, "rb"))
    if uri.startswith("s3://"):
        fetch = file.cache.fetcher
        file.cache.fetcher = lambda start, end: _ask(uri, "read", lambda: fetch(start, end))
    return file


def _upload(uri: str, num_bytes: int, send: Callable[[Any, str, dict[str, Any]], object]) -> bool:
    """Send an object until it lies there; False where ``send`` is a create and another object lies there."""
    filesystem, key = _open_s3(uri)
    bucket, _, name = key.partition("/")

    def send_marked(mark: str) -> None:
        _ask(uri, "write", lambda: send(filesystem, key, {"Metadata": {_MARK_NAME: mark}}))

    def look() -> tuple[int, str | None] | None:
        try:
            head = _ask(uri, "look up", lambda: filesystem.call_s3("head_object", Bucket=bucket, Key=name))
        except FileNotFoundError:
            return None
        return int(head["ContentLength"]), head.get("Metadata", {}).get(_MARK_NAME)

    return upload_until_stored(uri, num_bytes, send_marked, look)


def _check_bucket(uri: str) -> None:
    """Raise OSError if the bucket does not exist: some servers create an unknown one on the first write to it."""
    filesystem, key = _open_s3(uri)
    bucket = key.split("/")[0]
    try:
        _ask(f"s3://{bucket}", "look up", lambda: filesystem.info(bucket))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no bucket {bucket!r}") from None


def delete_file(uri: str) -> None:
    """Delete a file; nothing happens where there is none."""
    path = local_path(uri)
    if path is not None:
        path.unlink(missing_ok=True)
    elif exists(uri):
        filesystem, key = _open_s3(uri)
        _ask(uri, "delete", lambda: filesystem.rm_file(key))


def _ask(uri: str, verb: str, call: Callable[[], _Answer]) -> _Answer:
    """Return what ``call`` gets from a remote store; StoreError ``cannot {verb} {uri}: ...`` once patience ends."""
    if not uri.startswith("s3://"):  # each of fsspec's file systems fails in ways of its own
        return ask_store(uri, verb, call, failures=(Exception,), broken=())
    try:
        from aiobotocore.response import AioReadTimeoutError  # type: ignore[import-untyped]
        from aiohttp import ClientError, ClientPayloadError
        from botocore.exceptions import (  # type: ignore[import-untyped]
            BotoCoreError,
            IncompleteReadError,
            ResponseStreamingError,
        )
        from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
    except ModuleNotFoundError:  # without the extra 's3'
        return ask_store(uri, verb, call, failures=(OSError,), broken=())
    # No answer at all is not among the broken ones: the client has waited for it more than once already.
    broken = (AioReadTimeoutError, ClientPayloadError, IncompleteReadError, ResponseStreamingError, ResponseParserError)
    return ask_store(
        uri, verb, call, failures=(OSError, BotoCoreError, ClientError, ResponseParserError), broken=broken
    )
