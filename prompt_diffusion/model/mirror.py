"""The store's mirror of a hub's repositories: ``{store}/mirror/bases/{repository}``, for machines that reach no hub.

A copy counts once its digests are beside it, and is used only where every file still has them.
"""

import json
import logging
import shutil
from functools import lru_cache
from pathlib import Path

from prompt_diffusion.model.references import FILES, fetch_repository, is_hub_reference
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.storage import open_input, read_bytes, write_bytes, write_from
from prompt_diffusion.store.uris import join_uri, local_path

logger = logging.getLogger(__name__)

MIRROR = "mirror/bases"
_DIGESTS = "digests.json"


def mirror_base(repository: str, store_root: str, place: Path | None = None) -> dict[str, str]:
    """Copy what is read of a repository (``name`` or ``name@revision``: a base or a ControlNet) into the store's mirror.

    ``place`` is a local folder that holds it, None asks the hub. Returns the SHA-256 of each file by its path. ValueError where
    no file of it is found.
    """
    folder = place or fetch_repository(repository)
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in paths):
        raise ValueError(f"{folder} holds no model in diffusers' layout with safetensors: nothing is mirrored")
    mirror = join_uri(store_root, MIRROR, repository)
    digests = {path.relative_to(folder).as_posix(): digest_file(path) for path in paths}
    for name in digests:
        write_from(join_uri(mirror, name), folder / name)
    # The digests come last: without them, nothing of the copy counts.
    write_bytes(join_uri(mirror, _DIGESTS), json.dumps(digests, indent=2).encode())
    return digests


def find_model(reference: str, store_root: str, cache_dir: Path) -> str:
    """Return a reference that every process of this machine can open: of a mirrored repository, the mirror's copy.

    The mirror takes precedence over the hub, where a name without a revision may mean other files tomorrow. ValueError names a
    mirrored file that is not what was mirrored.
    """
    if is_hub_reference(reference):
        mirrored = _open_mirror(reference, store_root, cache_dir)
        return reference if mirrored is None else str(mirrored)
    folder = Path(reference)
    return str(folder.resolve()) if folder.is_dir() else reference


@lru_cache(maxsize=16)
def _open_mirror(reference: str, store_root: str, cache_dir: Path) -> Path | None:
    """Return a local folder with a mirrored repository, every file checked; None where the store has none."""
    mirror = join_uri(store_root, MIRROR, reference)
    try:
        listing = read_bytes(join_uri(mirror, _DIGESTS))
    except (FileNotFoundError, NotADirectoryError):
        return None
    digests: dict[str, str] = json.loads(listing)
    folder = local_path(mirror) or cache_dir / "bases" / compute_digest(listing)[:16]
    for name, digest in digests.items():
        path = folder / name
        if local_path(mirror) is None and not path.is_file():
            _fetch(join_uri(mirror, name), path)
        found = digest_file(path) if path.is_file() else "none: it is missing"
        if found != digest:
            raise ValueError(f"{join_uri(mirror, name)} is not what was mirrored: its sha256 is {found}, not {digest}")
    logger.info("%s from the mirror %s", reference, mirror)
    return folder.resolve()


def _fetch(uri: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open_input(uri) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 22)
    partial.replace(path)
