"""One architecture in two languages: the original layout, and diffusers' configurations."""

from collections.abc import Mapping
from typing import Any

from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)

from prompt_diffusion.model.original.layout import (
    NORM_GROUPS,
    NUM_STEM_STAGES,
    OriginalLayout,
    TextLayout,
    UNetLayout,
    VAELayout,
)

Config = Mapping[str, Any]
# what the original code does without saying it in any file; another value cannot be written in its layout
_UNET_FIXED: dict[str, Any] = {
    "norm_num_groups": NORM_GROUPS,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
    "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
_VAE_FIXED: dict[str, Any] = {
    "norm_num_groups": NORM_GROUPS,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_TEXT_FIXED: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SCHEDULER_FIXED: dict[str, Any] = {
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
# of SD v1.5's text encoder; they decide only what is pooled, which nothing here reads
_TEXT_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def unet_config(layout: OriginalLayout, image_size: int) -> dict[str, Any]:
    """Return diffusers' configuration of the UNet, for images of that many pixels a side."""
    config = create_unet_diffusers_config_from_ldm(_original_config(layout), checkpoint={})
    return {**config, "sample_size": image_size // vae_stride(layout.vae)}


def vae_config(layout: OriginalLayout, image_size: int, scaling_factor: float) -> dict[str, Any]:
    """Return diffusers' configuration of the autoencoder."""
    config = create_vae_diffusers_config_from_ldm(
        _original_config(layout), checkpoint={}, scaling_factor=scaling_factor
    )
    return {**config, "sample_size": image_size}


def text_config(layout: TextLayout) -> dict[str, Any]:
    """Return transformers' configuration of the text encoder."""
    return {
        "vocab_size": layout.vocabulary_size,
        "hidden_size": layout.width,
        "intermediate_size": layout.inner_width,
        "projection_dim": layout.width,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": layout.num_heads,
        "max_position_embeddings": layout.num_positions,
        **_TEXT_FIXED,
        **_TEXT_TOKENS,
    }


def vae_stride(layout: VAELayout) -> int:
    """Return the pixels along one side of an image for each latent along one side."""
    return int(2 ** (len(layout.channels) - 1))


def layout_of(
    unet: Config, vae: Config, text: Config, scheduler: Config, stem_channels: tuple[int, ...] | None
) -> OriginalLayout:
    """Return the original layout of a model by its parts' configurations.

    ValueError names, in one sentence, everything that the original layout cannot express.
    """
    wrong = _list_inexpressible(unet, vae, text, scheduler, stem_channels)
    if wrong:
        raise ValueError(f"the original layout cannot express {'; '.join(wrong)}; in brackets, what it can")
    channels = list(unet["block_out_channels"])
    return OriginalLayout(
        UNetLayout(
            model_channels=channels[0],
            channel_mult=tuple(width // channels[0] for width in channels),
            num_res_blocks=unet["layers_per_block"],
            attention=tuple("CrossAttn" in name for name in unet["down_block_types"]),
            transformer_depth=unet.get("transformer_layers_per_block", 1),
            context_dim=unet["cross_attention_dim"],
            in_channels=unet["in_channels"],
            out_channels=unet["out_channels"],
            use_linear_in_transformer=unet.get("use_linear_projection", False),
            num_heads=_find_heads(unet),
        ),
        VAELayout(
            channels=tuple(vae["block_out_channels"]),
            num_res_blocks=vae["layers_per_block"],
            in_channels=vae["in_channels"],
            out_channels=vae["out_channels"],
            latent_channels=vae["latent_channels"],
        ),
        TextLayout(
            width=text["hidden_size"],
            inner_width=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_positions=text["max_position_embeddings"],
            vocabulary_size=text["vocab_size"],
        ),
        stem_channels,
    )


def _list_inexpressible(
    unet: Config, vae: Config, text: Config, scheduler: Config, stem_channels: tuple[int, ...] | None
) -> list[str]:
    """Return everything that the original layout cannot express, in brackets what it can."""
    wrong = [
        *_list_departures("UNet", unet, _UNET_FIXED),
        *_list_departures("autoencoder", vae, _VAE_FIXED),
        *_list_departures("text encoder", text, _TEXT_FIXED),
        *_list_departures("scheduler", scheduler, _SCHEDULER_FIXED),
    ]
    channels = list(unet["block_out_channels"])
    if any(width % channels[0] for width in channels):
        wrong.append(f"the UNet's block_out_channels {channels} (multiples of the first)")
    for name, value in (("heads", _find_heads(unet)), ("layers_per_block", unet["layers_per_block"])):
        if not isinstance(value, int):
            wrong.append(f"the UNet's {name} {list(value)} (one number for all levels)")
    if not isinstance(unet.get("transformer_layers_per_block", 1), int):
        wrong.append("the UNet's transformer_layers_per_block (one number for all levels)")
    mirrored = ["CrossAttn" in name for name in reversed(unet["up_block_types"])]
    attention = ["CrossAttn" in name for name in unet["down_block_types"]]
    if mirrored != attention:
        wrong.append("the UNet's up_block_types (the mirror of its down_block_types)")
    if stem_channels is not None and len(stem_channels) != NUM_STEM_STAGES:
        wrong.append(f"stems of {len(stem_channels)} stages ({NUM_STEM_STAGES})")
    return wrong


def _find_heads(unet: Config) -> Any:  # noqa: ANN401 - one number, or one for each level
    return unet.get("num_attention_heads") or unet["attention_head_dim"]


def _list_departures(part: str, config: Config, fixed: Config) -> list[str]:
    return [
        f"the {part}'s {name} {config[name]!r} ({value!r})"
        for name, value in fixed.items()
        if name in config and config[name] != value
    ]


def _original_config(layout: OriginalLayout) -> dict[str, Any]:
    """Return what the original configuration file would hold, as diffusers' converters read it."""
    unet, vae = layout.unet, layout.vae
    return {
        "model": {
            "params": {
                "unet_config": {
                    "params": {
                        "in_channels": unet.in_channels,
                        "out_channels": unet.out_channels,
                        "model_channels": unet.model_channels,
                        "channel_mult": list(unet.channel_mult),
                        "num_res_blocks": unet.num_res_blocks,
                        "attention_resolutions": [2**level for level, has in enumerate(unet.attention) if has],
                        "num_heads": unet.num_heads,
                        "transformer_depth": unet.transformer_depth,
                        "context_dim": unet.context_dim,
                        "use_linear_in_transformer": unet.use_linear_in_transformer,
                    }
                },
                "first_stage_config": {
                    "params": {
                        "ddconfig": {
                            "ch": 1,
                            "ch_mult": list(vae.channels),
                            "num_res_blocks": vae.num_res_blocks,
                            "in_channels": vae.in_channels,
                            "out_ch": vae.out_channels,
                            "z_channels": vae.latent_channels,
                        }
                    }
                },
            }
        }
    }
