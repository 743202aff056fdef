"""Which original tensor becomes which of diffusers': diffusers' own converters, asked by sending numbers through them.

A converter is given numbers in place of tensors, one per name; what comes out says where each name went. So one table serves
import and export, and a name that a converter drops, or takes twice, is an error here and not a silent loss.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from prompt_diffusion.model.original.layout import (
    CONTROL,
    EXAMPLE_STEM,
    QUERY_STEM,
    TEXT,
    UNET,
    VAE,
    OriginalLayout,
    control_keys,
    text_keys,
    unet_keys,
    vae_keys,
)

Names = dict[str, str]
"""Original names by diffusers' names, of one part."""
_STEM = "controlnet_cond_embedding."


def map_names(layout: OriginalLayout) -> dict[str, Names]:
    """Return, for each part of a pipeline (``unet``, ``vae``, ``text_encoder``, ``controlnet``), original names by ours."""
    blocks = {"layers_per_block": layout.unet.num_res_blocks}
    levels = ["level"] * len(layout.vae.channels)
    parts = {
        "unet": _trace(lambda c: convert_ldm_unet_checkpoint(c, blocks), _prefixed(UNET, unet_keys(layout.unet))),
        "vae": _trace(
            lambda c: convert_ldm_vae_checkpoint(c, {"down_block_types": levels, "up_block_types": levels}),
            _prefixed(VAE, vae_keys(layout.vae)),
        ),
        "text_encoder": _trace(convert_ldm_clip_checkpoint, _prefixed(TEXT, text_keys(layout.text))),
    }
    # transformers keeps the text encoder flat since 5.6
    parts["text_encoder"] = {ours.removeprefix("text_model."): key for ours, key in parts["text_encoder"].items()}
    if layout.stem_channels is not None:
        parts["controlnet"] = _map_control(_prefixed(CONTROL, control_keys(layout.unet)), blocks)
    return parts


def _map_control(keys: list[str], blocks: Mapping[str, int]) -> Names:
    """Map a control model's names: diffusers' converter knows one stem, so it is asked twice."""
    names: Names = {}
    for stem, other, ours in ((EXAMPLE_STEM, QUERY_STEM, "example_stem."), (QUERY_STEM, EXAMPLE_STEM, "query_stem.")):
        asked = {key.replace(stem, EXAMPLE_STEM): key for key in keys if not key.startswith(other)}
        traced = _trace(lambda c: convert_controlnet_checkpoint(c, blocks), list(asked))
        for name, key in traced.items():
            renamed = name.replace(_STEM, ours) if name.startswith(_STEM) else f"trunk.{name}"
            names[renamed] = asked[key]
    return names


def _trace(convert: Callable[[dict[str, Tensor]], dict[str, Any]], keys: list[str]) -> Names:
    # of four dimensions, as converters turn some kernels into matrices
    numbered = {key: torch.full((1, 1, 1, 1), index) for index, key in enumerate(keys)}
    names = {name: keys[int(value.flatten()[0])] for name, value in convert(numbered).items()}
    assert sorted(names.values()) == sorted(keys), "a converter dropped a name or took one twice"
    return names


def _prefixed(prefix: str, keys: Iterable[str]) -> list[str]:
    return [prefix + key for key in keys]
