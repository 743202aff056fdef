"""Writing a stage's files, and sealing them: ``manifest.parquet`` comes last and ends the stage."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from prompt_diffusion.store.codec import encode_manifest, find_versions
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import StageIdentity, compute_digest
from prompt_diffusion.store.manifest import is_sealed, open_manifest
from prompt_diffusion.store.records import DamagedDataError, ManifestRef, Reject, StoredFile
from prompt_diffusion.store.sealed_files import MANIFEST_NAME, check_path
from prompt_diffusion.store.storage import create_bytes, list_sizes, write_bytes, write_from
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)


def write_file(identity: StageIdentity, store_root: str, path: str, data: bytes, rows: int = 0) -> StoredFile:
    """Write one file of a stage that is not sharded (weights, JSON, a report)."""
    uri = identity.uri(store_root)
    check_path(uri, path)
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
        check_path(uri, path)
        if not sealed:
            write_from(join_uri(uri, path), source)
        files.append(StoredFile(path, 0, source.stat().st_size, digest_file(source)))
    return files


def describe_file(path: str, data: bytes, rows: int = 0) -> StoredFile:
    """Return size and digest of a content under the path that it has in its manifest."""
    return StoredFile(path=path, rows=rows, bytes=len(data), sha256=compute_digest(data))


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
        check_path(uri, file.path)
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
