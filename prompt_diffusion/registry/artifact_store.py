"""A version's artifact where it lies, whatever became of the run that it was uploaded to: reading, checking, uploading."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.artifact import FACTS_FILE
from prompt_diffusion.registry.cache import DIGESTS_FILE
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.digest import digest_file

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_SERVED_FILES = (FACTS_FILE, "MLmodel", "model_code.py")


def find_local(uri: str) -> Path | None:
    """Return the path of an artifact on this machine, None for one elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(uri)


def find_damage(location: str, digests: dict[str, str], listing_digest: str, settings: Settings) -> list[str]:
    """Return the files of an artifact that are missing or not what was registered, by reading it through."""
    wanted: dict[str, str | None] = {f"{PIPELINE_FOLDER}/{path}": sha256 for path, sha256 in digests.items()}
    wanted |= {f"{PIPELINE_FOLDER}/{DIGESTS_FILE}": listing_digest} | dict.fromkeys(_SERVED_FILES)
    return [path for path, sha256 in wanted.items() if not _is_whole(location, path, sha256, settings)]


def _is_whole(location: str, path: str, sha256: str | None, settings: Settings) -> bool:
    """Say whether a file is there and has the digest (None: whatever it holds)."""
    local = find_local(location)
    if local is not None:
        file = local / path
        return file.is_file() and sha256 in (None, digest_file(file))
    with tempfile.TemporaryDirectory() as folder:
        found = _download(location, path, Path(folder), settings)
        return found is not None and sha256 in (None, digest_file(found))


def read_artifact(location: str, path: str, settings: Settings) -> bytes | None:
    """Return a file of an artifact, None where it is not there any more."""
    local = find_local(location)
    if local is not None:
        return (local / path).read_bytes() if (local / path).is_file() else None
    with tempfile.TemporaryDirectory() as folder:
        found = _download(location, path, Path(folder), settings)
        return None if found is None else found.read_bytes()


def upload(location: str, folder: Path, settings: Settings) -> None:
    """Upload all that a local folder holds, over what lies at the location."""
    _open(location, settings).log_artifacts(str(folder))


def upload_file(location: str, path: str, content: bytes, settings: Settings) -> None:
    """Upload one file of an artifact, over what lies there."""
    parent, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        _open(location, settings).log_artifact(str(file), parent or None)


def _download(location: str, path: str, folder: Path, settings: Settings) -> Path | None:
    """Fetch a file; None where it is not there."""
    repository = _open(location, settings)
    parent = path.rpartition("/")[0] or None
    if path not in {file.path for file in repository.list_artifacts(parent)}:
        return None
    return Path(repository.download_artifacts(path, str(folder)))


def _open(location: str, settings: Settings) -> "ArtifactRepository":
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = settings.tracking_uri
    repository: ArtifactRepository = get_artifact_repository(location, tracking_uri=uri, registry_uri=uri)
    return repository
