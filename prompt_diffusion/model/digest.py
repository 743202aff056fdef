"""What a model's folder holds, as one digest: the values that are loaded, not the bytes that they are written in.

Everything is loaded as float32, so float32 values are what counts: the same network saved in float16 (where that loses
nothing), in one file or in several, by another version of diffusers or from another folder, has the same digest.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest, write_canonical_json

_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "*-of-*.safetensors")
_TEXTS = ("*.json", "*.txt")
# what save_pretrained notes about the saving, and nothing reads when it loads in float32
_NOTES = (
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "is_local",
    "local_files_only",
    "torch_dtype",
    "transformers_version",
)
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_OTHERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "<u1"}


def digest_parts(folder: Path, parts: Sequence[str]) -> str:
    """Return one digest of some folders below a model's folder; ValueError names the one that is missing or damaged."""
    lines = [f"{part} {_digest_part(folder / part)}" for part in sorted(parts)]
    return compute_digest("\n".join(lines).encode())


def _digest_part(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    texts = [path for path in files if any(fnmatch(path.name, pattern) for pattern in _TEXTS)]
    weights = [path for path in files if any(fnmatch(path.name, pattern) for pattern in _WEIGHTS)]
    if not texts:
        raise ValueError(f"{folder.parent} is no model in diffusers' layout: it has no {folder.name}")
    digest = hashlib.sha256()
    for path in texts:
        if not path.name.endswith(".index.json"):
            digest.update(f"{path.name} {_digest_text(path)}\n".encode())
    for name, shape, values in _read_tensors(weights):
        digest.update(f"{name} {shape} ".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _digest_text(path: Path) -> str:
    """Digest a text; of a configuration, all but what was noted when it was saved."""
    if path.suffix != ".json":
        return digest_file(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in _NOTES}
    return compute_digest(write_canonical_json(content).encode())


def _read_tensors(files: Iterable[Path]) -> Iterable[tuple[str, list[int], NDArray[Any]]]:
    """Yield every tensor of safetensors files by name, in the names' order: name, shape, values (floats as float32)."""
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        start, header = _read_header(path)
        found |= {name: (path, start, entry) for name, entry in header.items() if name != "__metadata__"}
    for name in sorted(found):
        path, start, entry = found[name]
        yield name, entry["shape"], _read_values(path, start, entry)


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where a safetensors file's values begin, and its header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if 8 + size + max(ends, default=0) > path.stat().st_size:
            raise ValueError("it is cut short")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: no safetensors file ({error})") from error
    return 8 + size, header


def _read_values(path: Path, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    kind, (first, last) = entry["dtype"], entry["data_offsets"]
    raw = np.fromfile(path, np.uint8, last - first, offset=start + first)
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind]).astype("<f4", copy=False)
    if kind == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    if kind not in _OTHERS:
        known = ", ".join([*_FLOATS, "BF16", *_OTHERS])
        raise ValueError(f"{path} has values of type {kind}: a base is loaded from {known}")
    return raw
