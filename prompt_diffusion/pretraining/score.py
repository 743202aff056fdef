"""What the demo's base is worth: how well its autoencoder restores pictures it has not seen, how well its UNet denoises."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from prompt_diffusion.data.families import IMAGE, show_row
from prompt_diffusion.data.transforms import from_model_range
from prompt_diffusion.model.base import Base
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.objectives import Pictures, ReadPicture, TextToImageObjective
from prompt_diffusion.pretraining.train import encode_pictures, tokenise

HELD_OUT_SEED = 90_000
"""Of the members of families that scores are taken on: a training draws its own from its recipe's seed."""
_BATCH = 16
_CARD = """---
license: apache-2.0
library_name: diffusers
---
# The demo's base model

To `make demo` it is what Stable Diffusion v1.5 is to the paper: a latent text-to-image diffusion model of diffusers' own
classes, here with {parameters:.1f} million parameters, for {size} x {size} pixels. It knows ray-cast scenes of coloured
primitives and nothing else, and is of no use for other pictures.

**Made by** the flow `pretrain/demo-base` of this repository, from scratch, on {scenes} scene pairs of world 1000 (the demo's
own scenes are of world 0: it has seen none of them) and their depth, edge, segmentation and normal maps: the autoencoder in
{vae_steps} steps of {vae_batch}, then UNet and text encoder together in {step} steps of {unet_batch}, on CPU. The autoencoder
has also seen endless variants: segmentations in random palettes, depth in random colour ramps, edges in other colours and
thicknesses, photographs with their colours changed. The UNet has also seen photographs mirrored, with their captions. Maps
carry no text. v-prediction, SD's betas rescaled to zero terminal SNR. Weights are stored in float16.

**Scores** on {num_scored} held-out pictures of each kind. The denoising loss on photographs with their captions is {loss:.4f}.
The autoencoder restores (RMSE over RGB in [0, 1]: the floor under what is generated with it):

| kind of picture | PSNR, dB | RMSE |
|---|---|---|
{rows}

Palettes, ramps, line styles and changes of colour are ones that no training has drawn.

The complete configuration is in `pretrain.json`.
"""


@dataclass(frozen=True)
class Restoration:
    """How close the autoencoder's restored pictures of one kind are to the pictures."""

    psnr: float
    """Decibels, from the mean squared error over all pictures."""
    rmse: float
    """The root of that error, over RGB in [0, 1]: as the table's image-to-map errors are measured."""


def score_autoencoder(
    vae: AutoencoderKL, read: ReadPicture, kinds: Iterable[str], num_pictures: int
) -> dict[str, Restoration]:
    """Return how well pictures of each kind are restored: the first rows, in members of families drawn for scores alone."""
    return {kind: _score_kind(vae, read, kind, num_pictures) for kind in kinds}


@torch.no_grad()
def _score_kind(vae: AutoencoderKL, read: ReadPicture, kind: str, num_pictures: int) -> Restoration:
    errors: list[float] = []
    for start in range(0, num_pictures, _BATCH):
        rows = range(start, min(start + _BATCH, num_pictures))
        pictures = np.stack([show_row(kind, read, HELD_OUT_SEED, row) for row in rows])
        restored = from_model_range(vae.decode(encode_pictures(vae, pictures)).sample)
        difference = (restored.astype(np.float64) - pictures) / 255.0
        errors += np.square(difference).mean(axis=(1, 2, 3)).tolist()
    error = float(np.mean(errors))
    return Restoration(psnr=-10.0 * float(np.log10(max(error, 1e-12))), rmse=error**0.5)


@torch.no_grad()
def compute_denoising_loss(
    base: Base, config: PretrainConfig, read: ReadPicture, captions: Sequence[str], num_pictures: int
) -> float:
    """Return the mean denoising loss on the first photographs with their captions, under fixed noise and uniform timesteps."""
    shown = captions[:num_pictures]
    latents = encode_pictures(base.vae, (read(IMAGE, row) for row in range(len(shown))))
    objective = TextToImageObjective(
        base.unet,
        base.text_encoder,
        DDPMScheduler.from_config(base.scheduler.config),
        {IMAGE: latents},
        {IMAGE: tokenise(base.tokenizer, shown)},
        tokenise(base.tokenizer, [""])[0],
        Pictures(read, shown, {IMAGE: 1.0}),
        config.noise.model_copy(update={"late_fraction": 0.0, "min_snr_gamma": None}),
        config.seed,
        text_dropout=0.0,
    )
    batches = [range(len(shown))[start : start + _BATCH] for start in range(0, len(shown), _BATCH)]
    losses = [objective.compute_losses(objective.prepare(indices))[0] for indices in batches]
    return float(torch.cat(losses).mean())


def write_scores(scores: Mapping[str, Restoration]) -> bytes:
    """Return the autoencoder's scores as JSON."""
    return json.dumps({kind: asdict(score) for kind, score in scores.items()}, indent=2).encode()


def read_scores(data: bytes) -> dict[str, Restoration]:
    """Return what ``write_scores`` wrote."""
    return {kind: Restoration(**score) for kind, score in json.loads(data).items()}


def write_base(
    base: Base,
    config: PretrainConfig,
    folder: Path,
    scores: Mapping[str, Restoration],
    loss: float,
    step: int,
    num_scenes: int,
    num_scored: int,
) -> None:
    """Write a base as it is shipped: float16 safetensors, its configuration, and a model card with measured scores."""
    base.save(folder, dtype=torch.float16)
    parameters = sum(p.numel() for part in (base.vae, base.unet, base.text_encoder) for p in part.parameters())
    card = _CARD.format(
        parameters=parameters / 1e6,
        size=config.image_size,
        scenes=num_scenes,
        vae_steps=config.vae_steps,
        vae_batch=config.vae_batch_size,
        step=step,
        unet_batch=config.unet_batch_size,
        num_scored=num_scored,
        rows="\n".join(f"| {kind} | {score.psnr:.1f} | {score.rmse:.4f} |" for kind, score in scores.items()),
        loss=loss,
    )
    (folder / "README.md").write_text(card)
    (folder / "pretrain.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
