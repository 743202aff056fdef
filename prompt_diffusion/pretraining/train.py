"""Pre-training of the demo's base, from scratch: autoencoder, tokenizer, text encoder and text-to-image UNet."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prompt_diffusion.building import builds_networks
from prompt_diffusion.data.families import IMAGE, MIRRORED
from prompt_diffusion.data.sources.scenes import mirror_caption
from prompt_diffusion.data.transforms import Pixels, to_model_range
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import OnEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.model.base import Base
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.objectives import (
    AutoencoderObjective,
    Pictures,
    TextToImageObjective,
    standardise_latents,
)

_START, _END = "<|startoftext|>", "<|endoftext|>"
_ENCODE_BATCH = 8  # more at once fit no cache and are slower
_STANDARDISED_ON = 2000


@builds_networks
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


@builds_networks
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
        # Letters that end a word are named, too: else they get their numbers in the order of a hash table that no two
        # processes share, and a training that goes on would read its captions with another vocabulary.
        special_tokens=[_START, _END, *(f"{letter}</w>" for letter in _find_last_letters(captions))],
        end_of_word_suffix="</w>",
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789,."),
        show_progress=False,
    )
    learner.train_from_iterator(sorted(set(captions)), trainer)
    learned = learner.model
    files = _read_bpe(learned)
    return CLIPTokenizer(vocab=files[0], merges=files[1], model_max_length=config.text_length)


def _find_last_letters(captions: Iterable[str]) -> list[str]:
    """Return what words and runs of punctuation end with, sorted; words as the tokenizer's pre-tokenizer has them."""
    return sorted({word[-1] for caption in captions for word in re.findall(r"\w+|[^\w\s]+", caption.lower())})


def _read_bpe(model: models.BPE) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a learned model, which tells them only through its serialised state."""
    state = json.loads(model.__getstate__())
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


@builds_networks
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


def _cut(images: Iterable[Pixels]) -> Iterator[list[Pixels]]:
    rest = iter(images)
    while batch := list(islice(rest, _ENCODE_BATCH)):
        yield batch


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: Iterable[Pixels]) -> Tensor:
    """Return the posterior means of images (H, W, 3): N, C, h, w."""
    batches = (np.stack(batch) for batch in _cut(images))
    return torch.cat([vae.encode(to_model_range(batch)).latent_dist.mean for batch in batches])


def train_autoencoder(
    config: PretrainConfig,
    pictures: Pictures,
    checkpoints: str,
    resources: TrainResources,
    world: World,
    on_event: OnEvent | None = None,
    validate: Callable[[AutoencoderKL], float] | None = None,
    check_owner: Callable[[], None] | None = None,
) -> AutoencoderKL:
    """Train the autoencoder from its newest checkpoint, and make its latents standard on photographs.

    ``check_owner`` raises where another run has taken the folder over.
    """
    torch.manual_seed(config.seed)
    vae = build_vae(config)
    num_samples = config.vae_steps * config.vae_batch_size
    run_loop(
        AutoencoderObjective(vae, pictures, config.seed, num_samples, config.crop_fraction),
        dict(vae.named_parameters()),
        LoopPlan(config.vae_steps, config.vae_batch_size, config.vae_optimizer, checkpoints, check_owner),
        resources,
        world,
        on_event,
        None if validate is None else lambda step: validate(vae),
    )
    vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    shown = range(min(len(pictures.captions), _STANDARDISED_ON))
    standardise_latents(vae, encode_pictures(vae, (pictures.read(IMAGE, row) for row in shown)))
    return vae


def build_base(config: PretrainConfig, vae: AutoencoderKL, captions: Sequence[str]) -> Base:
    """Build the base around a trained autoencoder: tokenizer learned from the captions, the networks with fresh weights."""
    torch.manual_seed(config.seed)
    unet, tokenizer = build_unet(config), train_tokenizer(captions, config)
    return Base(vae, unet, build_text_encoder(config, tokenizer), tokenizer, build_scheduler(config))


def name_parameters(base: Base) -> dict[str, Tensor]:
    """Return what the text-to-image training trains, under the names that its checkpoints have."""
    parameters: dict[str, Tensor] = {f"unet.{name}": p for name, p in base.unet.named_parameters()}
    return parameters | {f"text_encoder.{name}": p for name, p in base.text_encoder.named_parameters()}


def train_text_to_image(
    config: PretrainConfig,
    base: Base,
    latents: Mapping[str, Tensor],
    captions: Sequence[str],
    checkpoints: str,
    resources: TrainResources,
    world: World,
    on_event: OnEvent | None = None,
    validate: Callable[[], float] | None = None,
    check_owner: Callable[[], None] | None = None,
) -> None:
    """Train UNet and text encoder of a base, in place, from their newest checkpoint.

    ``latents``: those of every kind in ``config.unet_shares``; mirrored photographs have the captions mirrored.
    ``check_owner`` raises where another run has taken the folder over.
    """
    mirrored = [mirror_caption(caption) for caption in captions] if MIRRORED in config.unet_shares else []
    tokens = {IMAGE: tokenise(base.tokenizer, captions)}
    if mirrored:
        tokens[MIRRORED] = tokenise(base.tokenizer, mirrored)
    objective = TextToImageObjective(
        base.unet,
        base.text_encoder,
        DDPMScheduler.from_config(base.scheduler.config),
        latents,
        tokens,
        tokenise(base.tokenizer, [""])[0],
        Pictures(_read_nothing, captions, config.unet_shares),
        config.noise,
        config.seed + 1,
        config.text_dropout,
    )
    run_loop(
        objective,
        name_parameters(base),
        LoopPlan(config.unet_steps, config.unet_batch_size, config.unet_optimizer, checkpoints, check_owner),
        resources,
        world,
        on_event,
        None if validate is None else lambda step: validate(),
    )
    base.unet.eval()
    base.text_encoder.eval()


def _read_nothing(kind: str, row: int) -> Pixels:
    raise AssertionError(f"latents are at hand: picture {row} of {kind} is not needed")


def tokenise(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return the tokens of texts, padded to the tokenizer's length: N, L."""
    length = tokenizer.model_max_length
    tokens: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens
