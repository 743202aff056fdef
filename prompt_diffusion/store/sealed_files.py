"""The files of a sealed folder: each is checked against its size and digest when it is read or fetched."""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.records import DamagedDataError, ManifestRef, StoredFile
from prompt_diffusion.store.storage import open_input, read_bytes
from prompt_diffusion.store.uris import join_uri

MANIFEST_NAME = "manifest.parquet"


@dataclass(frozen=True)
class SealedFiles:
    """What was sealed in one folder."""

    ref: ManifestRef
    files: tuple[StoredFile, ...]

    def read_file(self, path: str) -> bytes:
        """Return a file's content; DamagedDataError names a file that is not as sealed."""
        expected = self._find_file(path)
        try:
            data = read_bytes(self._uri_of(path))
        except FileNotFoundError as error:
            raise refuse(self.ref.uri, path, "is missing, though its manifest is sealed") from error
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
            raise refuse(self.ref.uri, file.path, "is missing, though its manifest is sealed") from error
        finally:
            partial.unlink(missing_ok=True)

    def _check(self, expected: StoredFile, num_bytes: int, digest: str) -> None:
        if num_bytes != expected.bytes:
            raise refuse(self.ref.uri, expected.path, f"has {num_bytes} bytes, sealed with {expected.bytes}")
        if digest != expected.sha256:
            raise refuse(self.ref.uri, expected.path, f"has the digest {digest}, sealed with {expected.sha256}")

    def _find_file(self, path: str) -> StoredFile:
        for file in self.files:
            if file.path == path:
                return file
        raise ValueError(f"{self.ref.uri} has no file {path!r}, only {', '.join(f.path for f in self.files)}")

    def _uri_of(self, path: str) -> str:
        return join_uri(self.ref.uri, path)


def refuse(uri: str, path: str, reason: str) -> DamagedDataError:
    """Return the error that names a damaged file of the folder ``uri``, and what to do."""
    way_out = f"delete {join_uri(uri, MANIFEST_NAME)} and run its stage again to make it anew"
    return DamagedDataError(f"{join_uri(uri, path)} {reason}; {way_out}")


def check_path(uri: str, path: str) -> None:
    """Raise DamagedDataError for a path that leaves the manifest's folder: what is fetched is written under it."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or path == MANIFEST_NAME:
        raise DamagedDataError(f"{uri} cannot hold a file at the path {path!r}")
