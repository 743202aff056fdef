"""The base model that Prompt Diffusion starts from: SD v1.5, or this project's own tiny one of the same classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prompt_diffusion.building import builds_networks
from prompt_diffusion.model.references import base_folder
from prompt_diffusion.model.text import encode_texts
from prompt_diffusion.model.tokenizers import check_tokenizer, load_tokenizer

_PARTS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDIMScheduler,
}
_NETWORKS = ("vae", "unet", "text_encoder")


@dataclass(frozen=True)
class Base:
    """A latent text-to-image diffusion model, by its diffusers parts."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return text embeddings: N, L, C. Text beyond the encoder's length is cut by the tokenizer."""
        return encode_texts(self.tokenizer, self.text_encoder, texts, self.text_encoder.device)

    @property
    def latent_stride(self) -> int:
        """Pixels along one side of an image for each latent along one side."""
        return compute_latent_stride(self.vae.config)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the parts as diffusers does, in safetensors of the given precision."""
        for name in _NETWORKS:
            part: Any = getattr(self, name)
            original = part.dtype
            part.to(dtype).save_pretrained(folder / name, safe_serialization=True)
            part.to(original)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")


def compute_latent_stride(vae_config: Mapping[str, Any]) -> int:
    """Return the pixels along one side of an image for each latent along one side, from an autoencoder's configuration."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


@builds_networks
def load_base(base: str) -> Base:
    """Load a base in float32, from safetensors alone: ``demo-base``, a folder in diffusers' layout, or a hub's repository.

    ValueError, in one sentence, where it cannot be found or lacks a part.
    """
    folder = base_folder(base)
    parts: dict[str, Any] = {}
    for name, kind in _PARTS.items():
        weights = {"use_safetensors": True} if name in _NETWORKS else {}
        try:
            is_tokenizer = name == "tokenizer"
            parts[name] = (
                load_tokenizer(folder / name) if is_tokenizer else kind.from_pretrained(folder / name, **weights)
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"base {base!r} has no {name} that can be loaded ({str(error).splitlines()[0]})"
            ) from error
    check_tokenizer(parts["tokenizer"], parts["text_encoder"], f"base {base!r}")
    for name in _NETWORKS:
        parts[name] = parts[name].float().eval().requires_grad_(False)
    return Base(**parts)
