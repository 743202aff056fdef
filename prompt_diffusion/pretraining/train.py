"""Pre-training of the demo's base, from scratch: autoencoder, tokenizer, text encoder and text-to-image UNet."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prompt_diffusion.data.transforms import from_model_range, to_model_range
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import OnEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.model.base import Base
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.objectives import (
    IMAGE,
    AutoencoderObjective,
    Pictures,
    TextToImageObjective,
    standardise_latents,
)

_START, _END = "<|startoftext|>", "<|endoftext|>"
_ENCODE_BATCH = 64


def build_vae(config: PretrainConfig) -> AutoencoderKL:
    """Build a small AutoencoderKL with fresh weights; it is convolutional throughout, so any size can be encoded."""
    levels = len(config.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=config.image_size,
    )


def build_unet(config: PretrainConfig) -> UNet2DConditionModel:
    """Build a small UNet2DConditionModel with fresh weights."""
    attending = len(config.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=config.image_size // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * attending),
        up_block_types=(*("CrossAttnUpBlock2D",) * attending, "UpBlock2D"),
        cross_attention_dim=config.text_channels,
        attention_head_dim=config.attention_heads,  # diffusers means the number of heads
        norm_num_groups=config.norm_groups,
    )


def build_scheduler(config: PretrainConfig) -> DDIMScheduler:
    """Build the scheduler: SD's betas, rescaled so that the last timestep is pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        prediction_type=config.noise.prediction_type,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def train_tokenizer(captions: Sequence[str], config: PretrainConfig) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from the captions, in the form of CLIP's tokenizer."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        special_tokens=[_START, _END],
        end_of_word_suffix="</w>",
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789,."),
        show_progress=False,
    )
    learner.train_from_iterator(sorted(set(captions)), trainer)
    learned = learner.model
    files = _read_bpe(learned)
    return CLIPTokenizer(vocab=files[0], merges=files[1], model_max_length=config.text_length)


def _read_bpe(model: models.BPE) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a learned model, which tells them only through its serialised state."""
    state = json.loads(model.__getstate__())
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def build_text_encoder(config: PretrainConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build a small CLIP text encoder with fresh weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_channels,
            intermediate_size=4 * config.text_channels,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.attention_heads,
            max_position_embeddings=config.text_length,
            projection_dim=config.text_channels,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Return the posterior means of N, H, W, 3 images: N, C, h, w."""
    batches = (images[start : start + _ENCODE_BATCH] for start in range(0, len(images), _ENCODE_BATCH))
    return torch.cat([vae.encode(to_model_range(batch)).latent_dist.mean for batch in batches])


@torch.no_grad()
def compute_psnr(vae: AutoencoderKL, images: NDArray[np.uint8]) -> float:
    """Return the reconstruction's peak signal-to-noise ratio over a set of images, in decibels."""
    restored = np.concatenate(
        [
            from_model_range(vae.decode(encode_pictures(vae, images[start : start + _ENCODE_BATCH])).sample)
            for start in range(0, len(images), _ENCODE_BATCH)
        ]
    )
    error = np.mean((restored.astype(np.float64) - images.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / error))


@torch.no_grad()
def compute_denoising_loss(
    base: Base, config: PretrainConfig, images: NDArray[np.uint8], captions: Sequence[str]
) -> float:
    """Return the mean denoising loss on images with their captions, under fixed noise and uniform timesteps."""
    noise_config = config.noise.model_copy(update={"late_fraction": 0.0})
    objective = TextToImageObjective(
        base.unet,
        base.text_encoder,
        DDPMScheduler.from_config(base.scheduler.config),
        {IMAGE: encode_pictures(base.vae, images)},
        _tokenise(base.tokenizer, captions[: len(images)]),
        _tokenise(base.tokenizer, [""])[0],
        Pictures({IMAGE: images}, captions[: len(images)], {IMAGE: 1.0}),
        noise_config,
        config.seed,
        text_dropout=0.0,
    )
    batches = [range(len(images))[start : start + _ENCODE_BATCH] for start in range(0, len(images), _ENCODE_BATCH)]
    losses = [objective.compute_losses(objective.prepare(indices))[0] for indices in batches]
    return float(torch.cat(losses).mean())


def pretrain_base(
    config: PretrainConfig,
    by_kind: dict[str, NDArray[np.uint8]],
    captions: Sequence[str],
    checkpoints: Callable[[str], str],
    resources: TrainResources,
    world: World,
    on_event: Callable[[str], OnEvent],
    check_owner: Callable[[], None] | None = None,
) -> Base:
    """Train autoencoder, then UNet and text encoder, on pictures and captions; resumes from checkpoints.

    ``checkpoints`` and ``on_event`` return the checkpoint folder and the listener of a phase, ``vae`` or ``unet``.
    ``check_owner`` raises where another run has taken the folders over.
    """
    torch.manual_seed(config.seed)
    vae, unet = build_vae(config), build_unet(config)
    tokenizer = train_tokenizer(captions, config)
    text_encoder = build_text_encoder(config, tokenizer)
    pictures = Pictures(by_kind, captions, config.vae_shares)
    run_loop(
        AutoencoderObjective(
            vae, pictures, config.seed, config.vae_steps * config.vae_batch_size, config.crop_fraction
        ),
        dict(vae.named_parameters()),
        LoopPlan(config.vae_steps, config.vae_batch_size, config.vae_optimizer, checkpoints("vae"), check_owner),
        resources,
        world,
        on_event("vae"),
    )
    vae.eval().requires_grad_(False)
    standardise_latents(vae, encode_pictures(vae, by_kind[IMAGE]))
    scheduler = build_scheduler(config)
    tokens = _tokenise(tokenizer, captions)
    objective = TextToImageObjective(
        unet,
        text_encoder,
        DDPMScheduler.from_config(scheduler.config),
        {kind: encode_pictures(vae, by_kind[kind]) for kind in config.unet_shares},
        tokens,
        _tokenise(tokenizer, [""])[0],
        Pictures(by_kind, captions, config.unet_shares),
        config.noise,
        config.seed + 1,
        config.text_dropout,
    )
    parameters: dict[str, Tensor] = {f"unet.{name}": p for name, p in unet.named_parameters()}
    parameters |= {f"text_encoder.{name}": p for name, p in text_encoder.named_parameters()}
    run_loop(
        objective,
        parameters,
        LoopPlan(config.unet_steps, config.unet_batch_size, config.unet_optimizer, checkpoints("unet"), check_owner),
        resources,
        world,
        on_event("unet"),
    )
    return Base(vae, unet.eval(), text_encoder.eval(), tokenizer, scheduler)


def _tokenise(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    length = tokenizer.model_max_length
    tokens: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens
