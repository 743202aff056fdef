"""Folders in diffusers' layout, read part by part as configuration and tensors: nothing is run, nothing made up."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from prompt_diffusion.model.original.layout import POSITIONS
from prompt_diffusion.model.original.read import read_checkpoint

_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "*-of-*.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
)
"""Names of weight files, the first one found is read: full precision before half, safetensors before pickles."""
_TEXT_MODEL = "text_model."
# how diffusers once named the projections of an autoencoder's attention
_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_config(folder: Path) -> dict[str, Any]:
    """Return a part's configuration; ValueError where it has none, or a damaged one."""
    names = [name for name in ("config.json", "scheduler_config.json") if (folder / name).is_file()]
    if not names:
        raise ValueError(
            f"{folder.parent} is no model in diffusers' layout: it has no {folder.name} with a configuration"
        )
    try:
        content = json.loads((folder / names[0]).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / names[0]} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / names[0]} is damaged: it is no configuration")
    return content


def find_weights(folder: Path) -> list[Path]:
    """Return the files of a part's weights; ValueError where there are none."""
    for pattern in _WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise ValueError(f"{folder} has no weights: none of {', '.join(_WEIGHTS[:2])} and the like")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return a part's tensors by the names that the present diffusers and transformers give them, mapped from the disk."""
    tensors: dict[str, Tensor] = {}
    for path in find_weights(folder):
        tensors |= read_checkpoint(path).tensors
    return {_modernise(name): value for name, value in tensors.items() if not POSITIONS.endswith(f".{name}")}


def _modernise(name: str) -> str:
    if name.startswith(_TEXT_MODEL):  # transformers keeps text encoders flat since 5.6
        return name.removeprefix(_TEXT_MODEL)
    if ".attentions." in name and "mid_block" in name:
        for old, new in _ATTENTION.items():
            name = name.replace(old, new)
    return name
