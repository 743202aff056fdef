"""One digest of all files that a source names, wherever they are stored, and of no other."""

import hashlib
import posixpath
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache

from prompt_diffusion.data.sources.base import is_name, locate, write_safely
from prompt_diffusion.store.fingerprint import compute_digest, write_canonical_json
from prompt_diffusion.store.storage import FileFacts, find_facts, list_facts, open_input, read_bytes
from prompt_diffusion.store.uris import join_uri, local_path

HASHED_BYTES = 1 << 30
"""Sources up to this size are digested by content, larger ones by names and sizes: nobody reads 400 GB to look something up."""
_FEW_FILES = 16  # up to this many are requested one by one; more are found by listing their folder


def digest_files(root: str, names: Iterable[str], *contents: bytes, ends: Mapping[str, int] | None = None) -> str:
    """Return a digest of the named files, wherever they are stored, and of the given contents.

    Up to 1 GiB in all, a file is its name and the MD5 of its content, which S3's listing includes; beyond that, its
    name and its size (an image that is changed in place to one of the same size then goes unseen), and for those in
    ``ends`` the digest of that many last bytes. A missing file counts by its name.
    """
    facts = find_all_facts(root, names)
    sizes = [found.size for found in facts.values() if found is not None]
    is_small = sum(size or 0 for size in sizes) <= HASHED_BYTES
    entries: list[list[str | int | None]] = []
    for name in sorted(facts):
        found, shown = facts[name], write_safely(name)
        if found is None:
            entries.append([shown, None])
        elif is_small:
            entries.append([shown, found.md5 or _hash_content(locate(root, name), found.size)])
        else:
            entries.append([shown, found.size, *_hash_end(locate(root, name), found, (ends or {}).get(name))])
    listing = [entries, [compute_digest(content) for content in contents]]
    return compute_digest(write_canonical_json(listing).encode())


def find_all_facts(root: str, names: Iterable[str]) -> dict[str, FileFacts | None]:
    """Return what the store says of each named file, links followed; None where there is none."""
    wanted = dict.fromkeys(name for name in names if name)
    places: dict[str, str] = {}
    for name in wanted:
        with suppress(ValueError):  # its row is rejected with the reason
            if is_name(name):
                places[name] = locate(root, name)
    listed: dict[str, FileFacts] = {}
    if local_path(root) is None and len(places) > _FEW_FILES:
        folder = posixpath.commonpath([posixpath.dirname(place.partition("://")[2]) for place in places.values()])
        scheme = root.partition("://")[0]
        with suppress(FileNotFoundError):  # a web server without pages of its folders
            above = f"{scheme}://{folder}"
            listed = {join_uri(above, name): facts for name, facts in list_facts(above).items()}
    found: dict[str, FileFacts | None] = {}
    for name in wanted:
        place = places.get(name)
        facts = None if place is None else listed.get(place)
        if place is not None and (facts is None or facts.size is None):
            facts = find_facts(place)
        found[name] = facts
    return found


def _hash_content(uri: str, size: int | None) -> str | None:
    """Return the MD5 of a file, as S3's listing gives it; None where it cannot be read."""
    try:
        return _hash_remote(uri, size) if local_path(uri) is None else _md5(read_bytes(uri))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return None  # its row is rejected with the reason


@lru_cache(maxsize=1 << 16)
def _hash_remote(uri: str, size: int | None) -> str:
    """Read a remote file for its digest once per process."""
    return _md5(read_bytes(uri))


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _hash_end(uri: str, facts: FileFacts, num_bytes: int | None) -> list[str]:
    if num_bytes is None:
        return []
    with open_input(uri) as file:
        file.seek(max(0, (facts.size or 0) - num_bytes))
        return [compute_digest(file.read())]
