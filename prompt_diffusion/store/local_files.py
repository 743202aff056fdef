"""The half of the storage that is a local folder: listings that bear company, files that appear whole or not at all, locks."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp~"


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep other processes and threads of this machine out for the time of the block; a killed holder lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def list_folder(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below a local folder, links followed; what is taken away meanwhile is left out.

    A link that leads back to a folder above it is not entered: the listing would have no end.
    """
    found: dict[str, int] = {}
    _list_below(folder, "", (), found)
    return found


def _list_below(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], found: dict[str, int]) -> None:
    """Add the files below `folder`, one of whose ancestors are the folders `above` (device and inode)."""
    with suppress(FileNotFoundError, NotADirectoryError):
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a link that leads nowhere, too
                    if _is_folder(entry):
                        _list_below(Path(entry.path), f"{prefix}{entry.name}/", (*above, here), found)
                    else:
                        found[prefix + entry.name] = entry.stat().st_size


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Say whether an entry is a folder or a link to one; FileNotFoundError for a link that leads nowhere or to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(f"{entry.path} is a link to itself") from error
        raise


@contextmanager
def temporary_file(path: Path, content: bytes | Path) -> Iterator[Path]:
    """Give a file with that content beside ``path``, on the disk before it gets its name, and gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
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
    except OSError as error:
        # A full disk is told by write, which knows no name.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
