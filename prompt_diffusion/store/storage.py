"""Where bytes live: one set of functions for a folder and for S3.

Any other scheme that fsspec knows (``hf://``, ``https://``) can be read and listed, never written. A store that fails is
retried (``retries.py``), then StoreError names the URI and the reason.
"""

import logging
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from prompt_diffusion.store.local_files import TEMPORARY_SUFFIX, list_folder, temporary_file
from prompt_diffusion.store.remote import ask, check_bucket, open_remote, open_remote_file, open_s3, upload
from prompt_diffusion.store.retries import StoreError, describe_error
from prompt_diffusion.store.uris import join_uri, local_path

logger = logging.getLogger(__name__)


def exists(uri: str) -> bool:
    """Say whether a file or a folder exists there."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    filesystem, key = open_remote(uri)
    try:
        ask(uri, "look up", lambda: filesystem.info(key))
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a store says about a file without its content."""

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
        filesystem, key = open_remote(uri)
        folder = filesystem._strip_protocol(key).rstrip("/") + "/"
        # A key that ends in a slash is a folder marker of a web console, not a file of ours.
        found = {
            name.removeprefix(folder): _read_facts(uri, entry)
            for name, entry in ask(uri, "list", lambda: filesystem.find(key, detail=True)).items()
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
    filesystem, key = open_remote(uri)
    try:
        entry = ask(uri, "look up", lambda: filesystem.info(key))
    except FileNotFoundError:
        return None
    return _read_facts(uri, entry) if entry["type"] == "file" else None


def list_files(uri: str) -> list[str]:
    """Return all files below a folder as sorted relative POSIX paths; empty where there is none."""
    return list(list_sizes(uri))


def read_bytes(uri: str) -> bytes:
    """Return the whole of a file; FileNotFoundError names the URI."""
    path = local_path(uri)
    try:
        if path is not None:
            return path.read_bytes()
        filesystem, key = open_remote(uri)
        return bytes(ask(uri, "read", lambda: filesystem.cat_file(key)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {uri}") from error


@contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """Open a file for seekable reading, as ``pyarrow.parquet.ParquetFile`` needs it; FileNotFoundError names the URI."""
    path = local_path(uri)
    try:
        file = path.open("rb") if path is not None else open_remote_file(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {uri}") from error
    with file:
        yield cast(BinaryIO, file)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically, replacing what was there; OSError where the store then holds something else."""
    path = local_path(uri)
    if path is None:
        upload(uri, len(data), lambda filesystem, key, options: filesystem.pipe_file(key, data, **options))
    else:
        with temporary_file(path, data) as temporary:
            temporary.replace(path)


def write_from(uri: str, source: Path) -> None:
    """Write a local file to a URI atomically without holding it in memory; OSError as ``write_bytes`` raises it."""
    path = local_path(uri)
    if path is None:
        num_bytes = source.stat().st_size
        upload(uri, num_bytes, lambda filesystem, key, options: filesystem.put_file(str(source), key, **options))
    else:
        with temporary_file(path, source) as temporary:
            temporary.replace(path)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file only if nothing is there, atomically; True if this call, of all that race, created it.

    That holds even where the answer of the creating request is lost and its retry finds the file in place.
    """
    path = local_path(uri)
    if path is None:
        return upload(
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


def delete_file(uri: str) -> None:
    """Delete a file; nothing happens where there is none."""
    path = local_path(uri)
    if path is not None:
        path.unlink(missing_ok=True)
    elif exists(uri):
        filesystem, key = open_s3(uri)
        ask(uri, "delete", lambda: filesystem.rm_file(key))


def delete_folder(uri: str) -> None:
    """Delete a folder and all below it; nothing happens where there is none."""
    path = local_path(uri)
    if path is not None:
        assert path.resolve() != Path(path.anchor), "never the root of the file system"
        if path.exists():
            shutil.rmtree(path)
        return
    filesystem, key = open_s3(uri)
    # s3fs would delete the bucket itself with its last key.
    assert "/" in key, f"{uri} is a bucket, not a folder in one"
    names = [f"{key}/{name}" for name in list_files(uri)]
    if names:
        ask(uri, "delete", lambda: filesystem.rm(names))
        # S3 says 200 to a bulk delete that failed for some keys, and s3fs does not look.
        left = {f"{key}/{name}" for name in list_files(uri)} & set(names)
        if left:
            raise StoreError(f"cannot delete {uri}: {len(left)} of {len(names)} files are still there")


def check_writable(root: str) -> None:
    """Write and remove a probe below ``root``; ValueError with the URI and the reason where that cannot be done."""
    probe = join_uri(root, f".probe-{uuid.uuid4().hex}")
    try:
        if local_path(root) is None:
            check_bucket(root)
        created = create_bytes(probe, b"probe")
        created_again = create_bytes(probe, b"probe")
        delete_file(probe)
    except ImportError as error:
        raise ValueError(f"cannot write to the store {root}: install the extra 's3' ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot write to the store {root}: {describe_error(error.__cause__ or error)}") from error
    if not created or created_again:
        logger.warning("the store %s ignores conditional writes: two runs that end at once may both seal", root)


def _read_facts(uri: str, entry: dict[str, Any]) -> FileFacts:
    tag = str(entry.get("ETag", "")).strip('"')
    has_md5 = uri.startswith("s3://") and re.fullmatch("[0-9a-f]{32}", tag)
    return FileFacts(None if entry["size"] is None else int(entry["size"]), tag if has_md5 else None)
