"""What a base reference means and how it enters a fingerprint; imports no torch, so that planning a run is fast."""

from functools import lru_cache
from pathlib import Path

from prompt_diffusion.store.fingerprint import compute_digest

DEMO_BASE = "demo-base"
DEMO_BASE_FOLDER = Path(__file__).parent / "demo_base"


def base_folder(base: str) -> Path | None:
    """Return the local folder of a base reference, or None for a hub repository."""
    if base == DEMO_BASE:
        return DEMO_BASE_FOLDER
    return Path(base) if Path(base).is_dir() else None


@lru_cache(maxsize=8)
def base_digest(base: str) -> str:
    """Return what identifies a base in fingerprints: the digest of a local folder's files, or the hub reference."""
    folder = base_folder(base)
    return folder_digest(folder) if folder else f"hub:{base}"


def folder_digest(folder: Path) -> str:
    """Return one digest of all files below a folder, by relative path and content (model cards aside)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    lines = [f"{path.relative_to(folder).as_posix()} {compute_digest(path.read_bytes())}" for path in files]
    return compute_digest("\n".join(lines).encode())
