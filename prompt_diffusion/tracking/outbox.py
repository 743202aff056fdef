"""What MLflow is to receive of a training, on the local disk before it is sent: it outlives an outage, and this process.

``{cache_dir}/tracking/{fingerprint}.jsonl`` has one JSON object a line, only ever appended to; the files that are to become
artifacts lie in ``{fingerprint}.files/``. Both go once everything has arrived. A line is complete once the call returns,
whatever happens to the process; only a crash of the machine can lose the last ones, and a training that resumes from its
checkpoint reports them again.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

_SUFFIX = ".jsonl"


class Outbox:
    """The records of one training, in the order in which they were written."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.path = folder / f"{fingerprint}{_SUFFIX}"
        self._files = folder / f"{fingerprint}.files"
        self._writer: BinaryIO | None = None

    def open(self) -> None:
        """Make ready for writing, and keep others from clearing it; a line that a killed process left incomplete is removed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            writer = self.path.open("a+b", buffering=0)
            fcntl.flock(writer, fcntl.LOCK_SH)
            if os.fstat(writer.fileno()).st_nlink:
                break
            writer.close()  # cleared while we waited for it
        writer.seek(0)
        writer.truncate(writer.read().rfind(b"\n") + 1)
        self._writer = writer

    def close(self) -> None:
        """End writing."""
        assert self._writer is not None, "an outbox is opened before it is closed"
        self._writer.close()

    def write(self, record: Record) -> None:
        """Append a record."""
        assert self._writer is not None, "an outbox is opened before it is written to"
        self._writer.write(json.dumps(record).encode() + b"\n")

    def keep_file(self, artifact: str, content: bytes) -> None:
        """Keep a file and append the record that makes it an artifact at that path."""
        target = self.file(artifact)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        self.write({"artifact": artifact})

    def file(self, artifact: str) -> Path:
        """Return the path of the file that becomes the artifact; it is gone once sent."""
        return self._files / artifact

    def read(self, position: int) -> tuple[list[Record], int]:
        """Return the records from a position (in bytes) on, and the position after them."""
        with self.path.open("rb") as file:
            file.seek(position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], position + len(whole)

    def clear(self, position: int) -> None:
        """Delete the outbox, unless somebody writes to it or has written beyond the position."""
        with self.path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if os.fstat(file.fileno()).st_size <= position:
                self.path.unlink()
                shutil.rmtree(self._files, ignore_errors=True)


def list_outboxes(folder: Path) -> list[Outbox]:
    """Return the outboxes in a folder: of running trainings, and of those not yet fully delivered."""
    return [Outbox(folder, path.name.removesuffix(_SUFFIX)) for path in sorted(folder.glob(f"*{_SUFFIX}"))]
