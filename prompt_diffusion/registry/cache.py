"""Local copies of registered models: ``{cache_dir}/models/{digest}``, complete and right each time they are handed out.

The digest is that of the list of all files' digests, which lies beside the folder as ``{digest}.json``. A copy is never taken
on trust: every file's SHA-256 is computed each time, and one that is missing or wrong is fetched again. So a process that is
killed while it fetches leaves nothing that counts, and a later one goes on from the files that it finished.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from prompt_diffusion.model.references import FILES
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.local_files import hold

logger = logging.getLogger(__name__)

MODELS = "models"
"""The folder of the cache that holds them."""
DIGESTS_FILE = "digests.json"
CARD_FILE = "README.md"
_CHECKS_AT_ONCE = 4  # hashing lets go of the interpreter
_FETCHES_AT_ONCE = 4

Fetch = Callable[[str, Path], None]
"""Writes the registered file of that relative path to a local path that does not exist yet."""


def complete_copy(models: Path, digest: str, fetch: Fetch, reference: str) -> Path:
    """Return the folder of a model's local copy, every file as registered, fetching what is missing or wrong.

    Processes that ask for the same model at once wait for each other. ValueError names a registered file that was altered.
    """
    models.mkdir(parents=True, exist_ok=True)
    folder = models / digest
    with hold(models / f"{digest}.lock"):
        digests = _read_listing(models / f"{digest}.json", digest, fetch, reference)
        folder.mkdir(exist_ok=True)
        for stranger in [path for path in folder.rglob("*") if path.is_file()]:
            # a file that is not registered could be loaded in the place of one that is
            if stranger.relative_to(folder).as_posix() not in {*digests, CARD_FILE}:
                stranger.unlink()
        with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
            found = pool.map(lambda path: _digest(folder / path), digests)
            missing = [path for path, sha256 in zip(digests, found, strict=True) if sha256 != digests[path]]
        if missing:
            logger.info("fetching %d files of %s into %s", len(missing), reference, folder)
        with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
            list(pool.map(lambda path: _fetch_file(folder / path, path, digests[path], fetch, reference), missing))
        if not (folder / CARD_FILE).is_file():
            with suppress(ValueError):  # it is for people who look into the folder: no model needs it
                fetch(CARD_FILE, folder / CARD_FILE)
    return folder.resolve()


def is_read(path: str) -> bool:
    """Say whether the loader reads a file of a pipeline's folder: safetensors, JSON and a tokenizer's text, never pickles."""
    return any(fnmatch(path, pattern) for pattern in FILES)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, which takes no room, or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _read_listing(place: Path, digest: str, fetch: Fetch, reference: str) -> dict[str, str]:
    """Return the digests of all files by path: from the local copy of the list, or fetched."""
    if not place.is_file() or digest_file(place) != digest:
        _fetch_file(place, DIGESTS_FILE, digest, fetch, reference)
    digests: dict[str, str] = json.loads(place.read_bytes())
    for path in digests:
        # Only what the loader reads, and nothing that would be written elsewhere.
        if ".." in PurePosixPath(path).parts or not is_read(path):
            raise ValueError(
                f"{reference!r} lists the file {path!r}, which no model of this project has: it is not loaded"
            )
    return digests


def _fetch_file(target: Path, path: str, sha256: str, fetch: Fetch, reference: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        fetch(path, partial)
        found = _digest(partial)
        if found != sha256:
            state = "it is missing" if found is None else f"its sha256 is {found}, not {sha256}"
            raise ValueError(
                f"{reference!r} was altered: {path} is not what was registered ({state}); load another version, or register "
                "the model again"
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _digest(path: Path) -> str | None:
    return digest_file(path) if path.is_file() else None


def digest_listing(digests: dict[str, str]) -> tuple[bytes, str]:
    """Return the bytes of a list of digests, and their own digest."""
    listing = json.dumps(digests, indent=2, sort_keys=True).encode()
    return listing, compute_digest(listing)


def check_folder(folder: Path, digest: str | None) -> None:
    """Raise ValueError, by name, for a file of a registered pipeline that is not what its list of digests says.

    ``digest`` is the list's own; None where it is not known: then only the files are checked against the list.
    """
    listing = (folder / DIGESTS_FILE).read_bytes()
    if digest is not None and compute_digest(listing) != digest:
        raise ValueError(f"{folder} was altered: {DIGESTS_FILE} is not what was registered")
    digests: dict[str, str] = json.loads(listing)
    with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
        found = pool.map(lambda path: _digest(folder / path), digests)
        for path, sha256 in zip(digests, found, strict=True):
            if sha256 != digests[path]:
                raise ValueError(f"{folder} was altered: {path} is not what was registered")
