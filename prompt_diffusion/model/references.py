"""What a reference to a base or a ControlNet means and how it enters a fingerprint.

Every reference stands for a local folder in diffusers' layout, and its fingerprint is a digest of what that folder holds: the
place, the hub's name and the precision on disk never count. A repository of a hub is therefore fetched before a run is
planned. Imports no torch, so that planning is fast.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from prompt_diffusion.model.digest import digest_parts

DEMO_BASE = "demo-base"
DEMO_BASE_FOLDER = Path(__file__).parent / "demo_base"
PIPELINE_FOLDER = "pipeline"
"""The folder of a sealed training, and of a registered model, that holds the pipeline."""
BESIDE_BASE = "base"
"""The reference of the ControlNet that stands beside the base."""
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
"""What a hub's repository is called: ``name`` or ``name@revision``."""
SD_V1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BASE_LICENCES = {
    DEMO_BASE: "Apache-2.0",
    SD_V1_5: "CreativeML OpenRAIL-M",
}
"""The licence of the bases that the presets name."""

_READ = ("*.json", "*.txt", "model.safetensors", "diffusion_pytorch_model.safetensors", "*-of-*.safetensors")
# of a repository that holds a ControlNet alone
_ROOT_FILES = ("config.json", "diffusion_pytorch_model.safetensors", "model_index.json")
FILES = (*_ROOT_FILES, *(f"{part}/{name}" for part in (*PARTS, "controlnet") for name in _READ))
"""Patterns of the files that are read: neither pickles nor the other precisions that a repository may hold."""


def base_folder(base: str) -> Path:
    """Return the local folder of a base: ``demo-base``, a folder, or a hub's repository (``name`` or ``name@revision``).

    A repository's files are fetched into the hub's own cache, or found there. ValueError, in one sentence, where they are
    missing and the hub cannot be reached.
    """
    if base == DEMO_BASE:
        return DEMO_BASE_FOLDER
    folder = Path(base)
    return folder if folder.is_dir() else fetch_repository(base)


def controlnet_folder(controlnet: str, base: str) -> Path:
    """Return the local folder of a ControlNet: ``base`` is the one beside that base; else a folder or a hub's repository."""
    if controlnet != BESIDE_BASE:
        folder = Path(controlnet)
        return folder if folder.is_dir() else fetch_repository(controlnet)
    folder = base_folder(base) / "controlnet"
    if not folder.is_dir():
        raise ValueError(
            f"controlnet is 'base', but base {base!r} has no controlnet beside it: it is no trained pipeline"
        )
    return folder


@lru_cache(maxsize=32)
def base_digest(base: str, parts: tuple[str, ...] | None = None) -> str:
    """Return what identifies a base, or the given parts of it, in fingerprints.

    It is the digest of the weights' float32 values and of the configurations, so that a copy in half precision whose values
    are the same, or a pipeline that was trained with that part frozen, has the same. ValueError names a part that is missing.
    """
    return digest_parts(base_folder(base), parts or PARTS)


@lru_cache(maxsize=32)
def controlnet_digest(controlnet: str, base: str) -> str:
    """Return what identifies a ControlNet to start from in fingerprints, as ``base_digest`` does."""
    folder = controlnet_folder(controlnet, base)
    return digest_parts(folder.parent, (folder.name,))


def is_hub_reference(reference: str) -> bool:
    """Say whether a reference can only be a hub's repository: it is neither a name of ours nor a folder here."""
    is_ours = reference in (DEMO_BASE, BESIDE_BASE) or reference.startswith("models:/")
    return not is_ours and not Path(reference).is_dir()


def fetch_repository(reference: str) -> Path:
    """Return the local snapshot of a hub's repository, ``name`` or ``name@revision``: what is read of it, and no more."""
    try:
        return download_snapshot(reference, FILES)
    except (OSError, ValueError) as error:  # no network, no such repository, no such name
        raise ValueError(
            f"model {reference!r} cannot be had: it is no folder here, and the hub did not give it "
            f"({type(error).__name__}); name 'demo-base', a folder in diffusers' layout, a repository of a hub that this "
            "machine can reach, or fill the store's mirror once with `prompt-diffusion weights mirror-base`"
        ) from error


def download_snapshot(reference: str, patterns: Sequence[str]) -> Path:
    """Return the local snapshot of what the patterns name in a hub's repository, ``name`` or ``name@revision``.

    OSError or ValueError where the hub does not provide it.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
