"""The half of the storage that is a local folder: listings that bear company, files that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp~"


def list_folder(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below a local folder; what another run takes away meanwhile is left out."""

    def raise_unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    found = {}
    for parent, _, names in os.walk(folder, onerror=raise_unless_gone):
        for name in names:
            file = Path(parent, name)
            with suppress(FileNotFoundError):
                found[file.relative_to(folder).as_posix()] = file.stat().st_size
    return found


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
