"""What the demo's base is trained on: reconstruction for its autoencoder, text-to-image for its UNet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses
from transformers import CLIPTextModel

from prompt_diffusion.data.families import find_source, vary
from prompt_diffusion.data.sampler import RowOrder, sample_generator
from prompt_diffusion.data.transforms import Pixels, to_model_range
from prompt_diffusion.engine.config import NoiseConfig
from prompt_diffusion.engine.noise import compute_min_snr_weights, draw_timestep, sample_noise

ReadPicture = Callable[[str, int], Pixels]
"""Gives the picture of a kind, ``image`` or a condition, in a row: uint8 H, W, 3."""


@dataclass(frozen=True)
class Pictures:
    """All that a base is shown: pictures by kind, the photographs' captions beside them."""

    read: ReadPicture
    """``image`` and each condition; the same row is the same scene."""
    captions: Sequence[str]
    """One caption a row."""
    shares: dict[str, float]
    """How often each kind is drawn, members of families among them; shares sum to 1."""

    def draw(self, seed: int, index: int) -> tuple[str, int, np.random.Generator]:
        """Return kind and row of a stream's sample, and the generator for what else is random in it."""
        generator = sample_generator(seed, index)
        kind = str(generator.choice(list(self.shares), p=list(self.shares.values())))
        return kind, RowOrder(seed, (len(self.captions),)).row_at(index), generator


@dataclass(frozen=True)
class PictureBatch:
    """A micro-batch of the autoencoder."""

    images: Tensor
    """N, 3, H, W in [-1, 1]."""
    noise: Tensor
    """N, C, h, w: what the posterior is sampled with."""
    labels: list[int]
    """The kind of each picture."""


@dataclass(frozen=True)
class LatentBatch:
    """A micro-batch of the UNet and text encoder."""

    latents: Tensor
    """N, C, h, w."""
    noise: Tensor
    """N, C, h, w."""
    timesteps: Tensor
    """N."""
    tokens: Tensor
    """N, L."""
    labels: list[int]
    """The kind of each picture."""


class AutoencoderObjective:
    """L1 + L2 + gradients' L1 in pixels, and a weak pull of the posterior to the unit Gaussian.

    The first ``crop_fraction`` of the samples are crops of half the size: a convolutional network without attention learns
    the same from them at a quarter of the cost.
    """

    def __init__(
        self, vae: AutoencoderKL, pictures: Pictures, seed: int, num_samples: int, crop_fraction: float
    ) -> None:
        self.vae, self.pictures, self.seed = vae, pictures, seed
        self.cropped_until = int(num_samples * crop_fraction)
        self.labels = tuple(pictures.shares)

    def prepare(self, indices: range) -> PictureBatch:
        """Draw, cut and stack the pictures."""
        images, labels, noises = [], [], []
        for index in indices:
            kind, row, generator = self.pictures.draw(self.seed, index)
            image = self.pictures.read(find_source(kind), row)
            size = image.shape[0] // 2 if indices.start < self.cropped_until else image.shape[0]
            top, left = (int(generator.integers(0, image.shape[0] - size + 1)) for _ in range(2))
            images.append(vary(kind, image[top : top + size, left : left + size], generator))
            labels.append(self.labels.index(kind))
            latent = size // 2 ** (len(self.vae.config["block_out_channels"]) - 1)
            noises.append(sample_noise(generator, (self.vae.config["latent_channels"], latent, latent)))
        return PictureBatch(to_model_range(np.stack(images)), torch.stack(noises), labels)

    def compute_losses(self, batch: PictureBatch) -> tuple[Tensor, list[int]]:
        """Return one loss a sample, and the kind of picture it was."""
        # crops are a fifth faster with channels last, whole pictures, which fit no cache, with channels first
        is_crop = batch.images.shape[-1] < self.vae.config["sample_size"]
        layout = torch.channels_last if is_crop else torch.contiguous_format
        self.vae.to(memory_format=layout)
        target = batch.images.contiguous(memory_format=layout)
        posterior = self.vae.encode(target).latent_dist
        output = self.vae.decode(posterior.mean + posterior.std * batch.noise).sample
        pixels = _mean((output - target).abs()) + _mean((output - target).square())
        edges = sum(_mean((output.diff(dim=axis) - target.diff(dim=axis)).abs()) for axis in (2, 3))
        return pixels + 0.5 * edges + 1e-4 * posterior.kl() / posterior.mean[0].numel(), batch.labels


class TextToImageObjective:
    """The usual denoising loss on latents, the caption as text; condition maps and some photographs go without text.

    ``latents``, by kind: N, C, h, w, a row each of the pictures, or of every second one (a pair's first). ``tokens``, of the
    kinds that have captions: N, L.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDPMScheduler,
        latents: Mapping[str, Tensor],
        tokens: Mapping[str, Tensor],
        empty_tokens: Tensor,
        pictures: Pictures,
        noise: NoiseConfig,
        seed: int,
        text_dropout: float,
    ) -> None:
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler
        self.latents, self.tokens, self.empty_tokens = latents, tokens, empty_tokens
        self.pictures, self.noise, self.seed, self.text_dropout = pictures, noise, seed, text_dropout
        self.labels = tuple(pictures.shares)

    def prepare(self, indices: range) -> LatentBatch:
        """Draw and stack what the network is shown."""
        clean, noises, timesteps, tokens, labels = [], [], [], [], []
        for index in indices:
            kind, row, generator = self.pictures.draw(self.seed, index)
            has_text = kind in self.tokens and generator.random() >= self.text_dropout
            latents = self.latents[kind]
            clean.append(latents[row * len(latents) // len(self.pictures.captions)])
            tokens.append(self.tokens[kind][row] if has_text else self.empty_tokens)
            timesteps.append(draw_timestep(generator, self.noise, self.scheduler.config["num_train_timesteps"]))
            noises.append(sample_noise(generator, clean[-1].shape))
            labels.append(self.labels.index(kind))
        return LatentBatch(
            torch.stack(clean), torch.stack(noises), torch.tensor(timesteps), torch.stack(tokens), labels
        )

    def compute_losses(self, batch: LatentBatch) -> tuple[Tensor, list[int]]:
        """Return one loss a sample, and the kind of picture it was."""
        text = self.text_encoder(batch.tokens).last_hidden_state
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        prediction = self.unet(noisy, batch.timesteps, text).sample
        target = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        losses, gamma = _mean((prediction - target).square()), self.noise.min_snr_gamma
        if gamma is not None:
            kind = self.scheduler.config["prediction_type"]
            losses = losses * compute_min_snr_weights(self.scheduler.alphas_cumprod, batch.timesteps, gamma, kind)
        return losses, batch.labels


def _mean(values: Tensor) -> Tensor:
    """Mean over everything but the batch."""
    return values.flatten(1).mean(dim=1)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold each latent channel's mean and standard deviation into the autoencoder, so that its latents are standard.

    ``latents``: posterior means N, C, h, w of a training set. After it ``scaling_factor = 1`` is right for stock code: the
    channels of a small autoencoder differ several times in scale, which one factor cannot mend.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert isinstance(quant, nn.Conv2d)
    assert isinstance(post, nn.Conv2d)
    # decode(z * std + mean): first, while the old scale is at hand
    assert post.bias is not None
    assert quant.bias is not None
    post.bias += F.conv2d(mean[None, :, None, None], post.weight).flatten()
    post.weight *= std[None, :, None, None]
    # the moments: (mean - m) / s for the means, logvar - 2 log s for the log variances
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
