"""Which architecture a checkpoint of the original layout has, read from the shapes of its tensors. Imports no torch."""

import re
from collections.abc import Mapping

from prompt_diffusion.model.original.layout import (
    CONTROL,
    EXAMPLE_STEM,
    NUM_STEM_STAGES,
    PUBLISHED_HEADS,
    QUERY_STEM,
    TEXT,
    TEXT_HEAD_CHANNELS,
    UNET,
    VAE,
    OriginalLayout,
    TextLayout,
    UNetLayout,
    VAELayout,
)

Shapes = Mapping[str, tuple[int, ...]]
_PARTS = {"a UNet": UNET, "an autoencoder": VAE, "a CLIP text encoder": TEXT}
_STEMS = {EXAMPLE_STEM: ("the example pair", 6), QUERY_STEM: ("the query", 3)}


def infer_layout(shapes: Shapes, num_heads: int = PUBLISHED_HEADS, num_text_heads: int | None = None) -> OriginalLayout:
    """Return the architecture of a checkpoint by the shapes of its tensors.

    Heads cannot be seen in shapes: ``num_heads`` are the UNet's (the published 8), ``num_text_heads`` the text encoder's (None:
    64 channels each, as in every CLIP). ValueError, in one sentence, where the tensors are those of something else.
    """
    missing = [
        f"{name} ({prefix}*)" for name, prefix in _PARTS.items() if not any(k.startswith(prefix) for k in shapes)
    ]
    if missing:
        found = sorted({key.split(".")[0] for key in shapes})
        raise ValueError(
            f"it is no checkpoint of the original layout: it lacks {', '.join(missing)}; its {len(shapes)} tensors are of "
            f"{', '.join(found[:6]) or 'nothing'}{' and others' if len(found) > 6 else ''}"
        )
    unet = _infer_unet(shapes, num_heads)
    vae = _infer_vae(shapes)
    text = _infer_text(shapes, num_text_heads)
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise ValueError(
            f"its UNet turns {unet.in_channels} channels into {unet.out_channels}, but its autoencoder's latents have "
            f"{vae.latent_channels}: it is a model of another kind (for inpainting?)"
        )
    if unet.context_dim != text.width:
        raise ValueError(f"its UNet reads text of {unet.context_dim} channels, but its text encoder gives {text.width}")
    has_control = any(key.startswith(CONTROL) for key in shapes)
    return OriginalLayout(unet, vae, text, _infer_stems(shapes) if has_control else None)


def _infer_unet(shapes: Shapes, num_heads: int) -> UNetLayout:
    model_channels, in_channels = _shape(shapes, f"{UNET}input_blocks.0.0.weight")[:2]
    levels: list[list[int]] = [[]]
    attention: list[list[bool]] = [[]]
    for index in range(1, _count(shapes, f"{UNET}input_blocks.")):
        prefix = f"{UNET}input_blocks.{index}"
        if any(key.startswith(f"{prefix}.0.op.") for key in shapes):
            levels.append([])
            attention.append([])
            continue
        levels[-1].append(_shape(shapes, f"{prefix}.0.in_layers.2.weight")[0])
        attention[-1].append(any(key.startswith(f"{prefix}.1.") for key in shapes))
    kinds = [set(zip(*level, strict=True)) for level in zip(levels, attention, strict=True)]
    if len({len(level) for level in levels}) != 1 or any(len(kind) != 1 for kind in kinds):
        raise ValueError(
            f"its UNet's levels are not alike: blocks of {levels} channels, with transformers {attention}; each level must "
            "have as many blocks, of one width, all with transformers or none"
        )
    channels = [level[0] for level in levels]
    if channels[0] != model_channels or any(width % model_channels or width % num_heads for width in channels):
        raise ValueError(
            f"its UNet's first convolution has {model_channels} channels and its levels {channels}: the first level must have "
            f"as many as the convolution, each a multiple of that and of the {num_heads} heads (--heads states how many the "
            "model was trained with)"
        )
    middle = f"{UNET}middle_block.1"
    return UNetLayout(
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in channels),
        num_res_blocks=len(levels[0]),
        attention=tuple(level[0] for level in attention),
        transformer_depth=_count(shapes, f"{middle}.transformer_blocks."),
        context_dim=_shape(shapes, f"{middle}.transformer_blocks.0.attn2.to_k.weight")[1],
        in_channels=in_channels,
        out_channels=_shape(shapes, f"{UNET}out.2.weight")[0],
        use_linear_in_transformer=len(_shape(shapes, f"{middle}.proj_in.weight")) == 2,
        num_heads=num_heads,
    )


def _infer_vae(shapes: Shapes) -> VAELayout:
    num_levels = _count(shapes, f"{VAE}encoder.down.")
    last = [f"{VAE}encoder.down.{level}.block.0.conv1.weight" for level in range(num_levels)]
    return VAELayout(
        channels=tuple(_shape(shapes, key)[0] for key in last),
        num_res_blocks=_count(shapes, f"{VAE}encoder.down.0.block."),
        in_channels=_shape(shapes, f"{VAE}encoder.conv_in.weight")[1],
        out_channels=_shape(shapes, f"{VAE}decoder.conv_out.weight")[0],
        latent_channels=_shape(shapes, f"{VAE}decoder.conv_in.weight")[1],
    )


def _infer_text(shapes: Shapes, num_heads: int | None) -> TextLayout:
    prefix = f"{TEXT}text_model."
    vocabulary_size, width = _shape(shapes, f"{prefix}embeddings.token_embedding.weight")
    heads = num_heads or max(1, width // TEXT_HEAD_CHANNELS)
    if width % heads:
        raise ValueError(
            f"its text encoder has {width} channels, which {heads} heads do not divide: state how many it has (--text-heads)"
        )
    return TextLayout(
        width=width,
        inner_width=_shape(shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        num_layers=_count(shapes, f"{prefix}encoder.layers."),
        num_heads=heads,
        num_positions=_shape(shapes, f"{prefix}embeddings.position_embedding.weight")[0],
        vocabulary_size=vocabulary_size,
    )


def _infer_stems(shapes: Shapes) -> tuple[int, ...]:
    """Return the channels of the stems' stages; ValueError where a stem does not read what it is for."""
    stems = []
    for prefix, (purpose, expected) in _STEMS.items():
        channels = _shape(shapes, f"{prefix}0.weight")[1]
        if channels != expected:
            raise ValueError(f"{prefix}0.weight reads {channels} channels, but the stem of {purpose} reads {expected}")
        stems.append(tuple(_shape(shapes, f"{prefix}{4 * stage}.weight")[0] for stage in range(NUM_STEM_STAGES)))
    if stems[0] != stems[1]:
        raise ValueError(f"its two stems differ: channels {stems[0]} for the example pair, {stems[1]} for the query")
    return stems[0]


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f"it is incomplete: it lacks {key}")
    return shapes[key]


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered modules follow a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for key in shapes if (match := pattern.match(key))), default=-1)
