"""What the pre-training of the demo's base is. The base is to the demo what SD v1.5 is to the paper."""

from pydantic import Field

from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig
from prompt_diffusion.frozen import FrozenModel

_SHORT_BUDGET = OptimizerConfig(
    name="muon",
    learning_rate=1e-3,
    muon_learning_rate=0.015,
    weight_decay=0.0,
    warmup_steps=50,
    flat_fraction=0.4,
    final_factor=0.02,
    clip_norm=1.0,
)


class PretrainConfig(FrozenModel):
    """Architecture and recipe of the demo's base: autoencoder, tokenizer, text encoder and UNet."""

    image_size: int = 64
    """Pixels along a side."""
    vae_channels: tuple[int, ...] = (16, 32, 64)
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
    vae_shares: dict[str, float] = {"image": 0.40, "depth": 0.15, "hed": 0.15, "seg": 0.20, "normal": 0.10}
    """How often the autoencoder sees each kind of picture."""
    unet_shares: dict[str, float] = {"image": 0.64, "depth": 0.12, "hed": 0.12, "seg": 0.12}
    """How often the UNet sees each kind of picture; maps carry no text, so that later the pair, not the text, decides."""
    text_dropout: float = 0.15
    """Share of the photographs shown without their caption."""
    crop_fraction: float = 0.75
    """Share of the autoencoder's samples that are crops of half the size."""
    noise: NoiseConfig = NoiseConfig(prediction_type="v_prediction", late_fraction=0.3)
    """SD's betas rescaled to zero terminal signal-to-noise ratio (Lin et al., 2024), v-prediction."""
    vae_optimizer: OptimizerConfig = _SHORT_BUDGET.model_copy(update={"muon_learning_rate": 0.01})
    """Recipe of the autoencoder."""
    unet_optimizer: OptimizerConfig = _SHORT_BUDGET
    """Recipe of UNet and text encoder, which are trained together."""
    vae_batch_size: int = Field(default=32, ge=1)
    """Samples a step of the autoencoder."""
    vae_steps: int = Field(default=1500, ge=1)
    """Steps of the autoencoder."""
    unet_batch_size: int = Field(default=48, ge=1)
    """Samples a step of the UNet."""
    unet_steps: int = Field(default=1000, ge=1)
    """Steps of the UNet and text encoder."""
    seed: int = 0
    """Seed of weights, order and noise."""
