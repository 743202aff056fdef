"""Networks of Stable Diffusion v1.5's layout with random weights, at its size or narrower, for the benchmarks."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from prompt_diffusion.model.base import Base
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.train import train_tokenizer

IMAGE_SIZE = 256


def build_base(divisor: int, captions: list[str]) -> Base:
    """Return SD v1.5's layout with every width divided, and random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=tuple(width // divisor for width in (320, 640, 1280, 1280)),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=_round(768 // divisor, 8),
        attention_head_dim=max(
            1, round(8 / divisor)
        ),  # diffusers' name for the heads: each stays about as wide as SD's
        norm_num_groups=32,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(max(32, width // divisor // 32 * 32) for width in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )
    tokenizer = train_tokenizer(captions, PretrainConfig(text_length=77))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_round(768 // divisor, 8),
            intermediate_size=4 * _round(768 // divisor, 8),
            num_hidden_layers=12,
            num_attention_heads=8,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    for part in (unet, vae, text_encoder):
        part.eval().requires_grad_(False)
    return Base(vae, unet, text_encoder, tokenizer, scheduler)


def _round(value: int, multiple: int) -> int:
    return max(multiple, value // multiple * multiple)
