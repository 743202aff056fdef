"""The original layout as data: which tensors a checkpoint of the paper's code, or of SD v1.5's, holds under which names.

Facts of Zhendong-Wang/Prompt-Diffusion at 8ecd2d1: ``control_model.input_hint_block`` reads the example pair (6 channels,
source then target), ``control_model.input_cond_block`` the query (3 channels); their sum is added after the first convolution.
Imports no torch.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise

UNET = "model.diffusion_model."
CONTROL = "control_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."
AVERAGES = "model_ema."
EXAMPLE_STEM = f"{CONTROL}input_hint_block."
QUERY_STEM = f"{CONTROL}input_cond_block."
POSITIONS = f"{TEXT}text_model.embeddings.position_ids"

NORM_GROUPS = 32
"""Groups of every group normalisation: written in the original code, so no checkpoint says it."""
PUBLISHED_HEADS = 8
TEXT_HEAD_CHANNELS = 64
"""Channels of one head of a CLIP text encoder: no checkpoint says it either."""
NUM_STEM_STAGES = 4
SCALING_FACTOR = 0.18215
NUM_TIMESTEPS = 1000

SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
"""Tensors that follow from the noise schedule."""
BUFFERS = (*SCHEDULE, "logvar", "lvlb_weights", "scale_factor", POSITIONS)
"""Tensors that are not weights: computed again, or unused beyond the original training."""


@dataclass(frozen=True)
class UNetLayout:
    """A UNet of the original code, as its configuration file would say it."""

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    """Whether a level has transformers, finest first."""
    transformer_depth: int
    context_dim: int
    in_channels: int
    out_channels: int
    use_linear_in_transformer: bool
    num_heads: int

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)


@dataclass(frozen=True)
class VAELayout:
    """An autoencoder of the original code."""

    channels: tuple[int, ...]
    num_res_blocks: int
    in_channels: int
    out_channels: int
    latent_channels: int


@dataclass(frozen=True)
class TextLayout:
    """A CLIP text encoder."""

    width: int
    inner_width: int
    num_layers: int
    num_heads: int
    num_positions: int
    vocabulary_size: int


@dataclass(frozen=True)
class OriginalLayout:
    """What a whole checkpoint holds; ``stem_channels`` is None for a base, which has no control model."""

    unet: UNetLayout
    vae: VAELayout
    text: TextLayout
    stem_channels: tuple[int, ...] | None


def list_keys(layout: OriginalLayout) -> list[str]:
    """Return the names of all weights, in the order of the original code."""
    keys = [UNET + key for key in unet_keys(layout.unet)]
    keys += [VAE + key for key in vae_keys(layout.vae)]
    keys += [TEXT + key for key in text_keys(layout.text)]
    if layout.stem_channels is not None:
        keys += [CONTROL + key for key in control_keys(layout.unet)]
    return keys


def unet_keys(layout: UNetLayout) -> Iterator[str]:
    """Yield the names of a UNet's weights, without their prefix."""
    skips = yield from _encoder(layout)
    width = layout.channels[-1]
    index = 0
    for level in reversed(range(len(layout.channels))):
        for block in range(layout.num_res_blocks + 1):
            prefix = f"output_blocks.{index}"
            has_skip = width + skips.pop() != layout.channels[level]
            width = layout.channels[level]
            yield from _residual_block(f"{prefix}.0", has_skip)
            if layout.attention[level]:
                yield from _transformer(f"{prefix}.1", layout.transformer_depth)
            if level and block == layout.num_res_blocks:
                yield from _affine(f"{prefix}.{2 if layout.attention[level] else 1}.conv")
            index += 1
    yield from _affine("out.0", "out.2")


def control_keys(layout: UNetLayout) -> Iterator[str]:
    """Yield the names of a control model's weights, without their prefix."""
    skips = yield from _encoder(layout)
    for index in range(len(skips)):
        yield from _affine(f"zero_convs.{index}.0")
    yield from _affine("middle_block_out.0")
    for stem in ("input_hint_block", "input_cond_block"):
        yield from _affine(*(f"{stem}.{2 * index}" for index in range(2 * NUM_STEM_STAGES)))


def vae_keys(layout: VAELayout) -> Iterator[str]:
    """Yield the names of an autoencoder's weights, without their prefix."""
    last = len(layout.channels) - 1
    yield from _affine("encoder.conv_in")
    for level, (before, width) in enumerate(pairwise((layout.channels[0], *layout.channels))):
        for block in range(layout.num_res_blocks):
            yield from _vae_block(f"encoder.down.{level}.block.{block}", block == 0 and before != width)
        if level < last:
            yield from _affine(f"encoder.down.{level}.downsample.conv")
    for side in ("encoder", "decoder"):
        yield from _vae_block(f"{side}.mid.block_1", False)
        yield from _affine(*(f"{side}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")))
        yield from _vae_block(f"{side}.mid.block_2", False)
        yield from _affine(f"{side}.norm_out", f"{side}.conv_out")
    yield from _affine("decoder.conv_in")
    for level, width in enumerate(layout.channels):
        before = layout.channels[min(level + 1, last)]
        for block in range(layout.num_res_blocks + 1):
            yield from _vae_block(f"decoder.up.{level}.block.{block}", block == 0 and before != width)
        if level:
            yield from _affine(f"decoder.up.{level}.upsample.conv")
    yield from _affine("quant_conv", "post_quant_conv")


def text_keys(layout: TextLayout) -> Iterator[str]:
    """Yield the names of a text encoder's weights, without their prefix."""
    for name in ("token", "position"):
        yield f"text_model.embeddings.{name}_embedding.weight"
    for index in range(layout.num_layers):
        prefix = f"text_model.encoder.layers.{index}"
        yield from _affine(*(f"{prefix}.self_attn.{name}_proj" for name in ("k", "v", "q", "out")))
        yield from _affine(*(f"{prefix}.{name}" for name in ("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2")))
    yield from _affine("text_model.final_layer_norm")


def is_kernel_of_a_matrix(key: str) -> bool:
    """Say whether a weight is a 1 x 1 kernel in the original layout and a matrix in diffusers': the autoencoder's attention."""
    return key.startswith(VAE) and ".mid.attn_1." in key and key.endswith("weight") and ".norm." not in key


def average_key(key: str) -> str:
    """Return the name under which the moving average of one of the UNet's weights is kept."""
    return AVERAGES + key.removeprefix("model.").replace(".", "")


def _encoder(layout: UNetLayout) -> Generator[str, None, list[int]]:
    """Yield the names of the encoder and the middle; returns (by ``yield from``) the channels of each skip connection."""
    yield from _affine("time_embed.0", "time_embed.2", "input_blocks.0.0")
    width = layout.model_channels
    skips = [width]
    for level, channels in enumerate(layout.channels):
        for _ in range(layout.num_res_blocks):
            prefix = f"input_blocks.{len(skips)}"
            yield from _residual_block(f"{prefix}.0", width != channels)
            if layout.attention[level]:
                yield from _transformer(f"{prefix}.1", layout.transformer_depth)
            width = channels
            skips.append(width)
        if level < len(layout.channels) - 1:
            yield from _affine(f"input_blocks.{len(skips)}.0.op")
            skips.append(width)
    yield from _residual_block("middle_block.0", False)
    yield from _transformer("middle_block.1", layout.transformer_depth)
    yield from _residual_block("middle_block.2", False)
    return skips


def _residual_block(prefix: str, has_skip: bool) -> Iterator[str]:
    names = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    yield from _affine(*(f"{prefix}.{name}" for name in (*names, *(("skip_connection",) if has_skip else ()))))


def _transformer(prefix: str, depth: int) -> Iterator[str]:
    yield from _affine(f"{prefix}.norm", f"{prefix}.proj_in", f"{prefix}.proj_out")
    for index in range(depth):
        block = f"{prefix}.transformer_blocks.{index}"
        for attention in ("attn1", "attn2"):
            yield from (f"{block}.{attention}.to_{name}.weight" for name in ("q", "k", "v"))
            yield from _affine(f"{block}.{attention}.to_out.0")
        names = ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
        yield from _affine(*(f"{block}.{name}" for name in names))


def _vae_block(prefix: str, has_skip: bool) -> Iterator[str]:
    names = ("norm1", "conv1", "norm2", "conv2", *(("nin_shortcut",) if has_skip else ()))
    yield from _affine(*(f"{prefix}.{name}" for name in names))


def _affine(*names: str) -> Iterator[str]:
    for name in names:
        yield f"{name}.weight"
        yield f"{name}.bias"
