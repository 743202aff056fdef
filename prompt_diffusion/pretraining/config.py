"""What the pre-training of the demo's base is. The base is to the demo what SD v1.5 is to the paper."""

from typing import Any

from pydantic import Field

from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig
from prompt_diffusion.frozen import FrozenModel

_VAE_OPTIMIZER = OptimizerConfig(
    name="muon",
    learning_rate=1e-3,
    muon_learning_rate=0.01,
    weight_decay=0.0,
    warmup_steps=100,
    flat_fraction=0.3,
    final_factor=0.02,
    clip_norm=1.0,
)
_UNET_OPTIMIZER = _VAE_OPTIMIZER.model_copy(update={"warmup_steps": 200, "flat_fraction": 0.7, "ema_decay": 0.999})


class PretrainConfig(FrozenModel):
    """Architecture and recipe of the demo's base: autoencoder, tokenizer, text encoder and UNet."""

    image_size: int = 128
    """Pixels along a side."""
    vae_channels: tuple[int, ...] = (16, 16, 32, 64)
    """Autoencoder channels by level; each level after the first halves the size."""
    latent_channels: int = 4
    """Channels of the latents."""
    unet_channels: tuple[int, ...] = (48, 80, 96)
    """UNet channels by level; every level but the first has cross-attention."""
    attention_heads: int = 4
    """Heads of every attention."""
    norm_groups: int = 16
    """Groups of the UNet's normalisations."""
    text_channels: int = 64
    """Width of the text encoder."""
    text_layers: int = 2
    """Layers of the text encoder."""
    text_length: int = 32
    """Tokens of a prompt, start and end among them."""
    vocabulary_size: int = 320
    """Tokens of the vocabulary, learned from the captions."""
    vae_shares: dict[str, float] = {
        "image": 0.28,
        "image_recolored": 0.10,
        "depth": 0.08,
        "depth_ramp": 0.10,
        "hed": 0.10,
        "hed_style": 0.08,
        "seg": 0.08,
        "seg_palette": 0.12,
        "normal": 0.06,
    }
    """How often the autoencoder sees each kind of picture: photographs, maps, and members of the families of both."""
    unet_shares: dict[str, float] = {
        "image": 0.32,
        "image_mirrored": 0.32,
        "depth": 0.08,
        "depth_ramp": 0.04,
        "hed": 0.08,
        "hed_style": 0.04,
        "seg": 0.08,
        "seg_palette": 0.04,
    }
    """How often the UNet sees each kind of picture; maps carry no text, so that later the pair, not the text, decides."""
    text_dropout: float = 0.15
    """Share of the photographs shown without their caption."""
    crop_fraction: float = 0.9
    """Share of the autoencoder's samples that are crops of half the size."""
    noise: NoiseConfig = NoiseConfig(prediction_type="v_prediction", late_fraction=0.3, min_snr_gamma=5.0)
    """SD's betas rescaled to zero terminal signal-to-noise ratio (Lin et al., 2024), v-prediction."""
    vae_optimizer: OptimizerConfig = _VAE_OPTIMIZER
    """Recipe of the autoencoder."""
    unet_optimizer: OptimizerConfig = _UNET_OPTIMIZER
    """Recipe of UNet and text encoder, which are trained together: flat for long, so that the number of steps may be chosen
    late: until the decay begins, the weights are the same whatever it is."""
    vae_batch_size: int = Field(default=16, ge=1)
    """Samples a step of the autoencoder."""
    vae_steps: int = Field(default=6400, ge=1)
    """Steps of the autoencoder."""
    unet_batch_size: int = Field(default=64, ge=1)
    """Samples a step of the UNet."""
    unet_steps: int = Field(default=22_000, ge=1)
    """Steps of the UNet and text encoder."""
    seed: int = 0
    """Seed of weights, order and noise."""

    def list_autoencoder_fields(self) -> dict[str, Any]:
        """Return the fields that shape the autoencoder: what else is changed leaves it as it is."""
        shared = {"image_size", "latent_channels", "crop_fraction", "seed"}
        chosen = {name for name in type(self).model_fields if name.startswith("vae_")} | shared
        return self.model_dump(mode="json", include=chosen)
