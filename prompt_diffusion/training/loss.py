"""The denoising objective of Prompt Diffusion, and the random draws that it shares with the base's pre-training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from prompt_diffusion.data.dataset import InContextData, Sample
from prompt_diffusion.data.sampler import row_at, sample_generator
from prompt_diffusion.data.transforms import to_model_range
from prompt_diffusion.model.base import Base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, predict_noise
from prompt_diffusion.training.config import NoiseConfig, TrainConfig
from prompt_diffusion.vision_tasks import VisionTask, find_vision_task


def draw_timestep(generator: np.random.Generator, noise: NoiseConfig, num_timesteps: int) -> int:
    """Draw a timestep uniformly, or for the recipe's share from the noisiest ones alone."""
    is_late = generator.random() < noise.late_fraction
    first = num_timesteps - noise.late_timesteps if is_late else 0
    return int(generator.integers(first, num_timesteps))


def weigh_by_snr(alphas_cumprod: Tensor, steps: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return each sample's loss weight of the min-SNR-gamma strategy (Hang et al., arXiv 2303.09556).

    ``alphas_cumprod``: the schedule, T; ``steps``: N. With SNR = a / (1 - a): min(SNR, gamma) / SNR for noise prediction,
    min(SNR, gamma) / (SNR + 1) for v.
    """
    signal = alphas_cumprod[steps]
    snr = signal / (1.0 - signal)
    capped = snr.clamp(max=gamma)
    # Where nothing of the signal is left, both vanish alike.
    return capped / (snr + 1.0) if prediction_type == "v_prediction" else torch.where(snr > 0, capped / snr, 1.0)


def sample_noise(generator: np.random.Generator, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Draw standard Gaussian noise of a shape in float32, on the CPU: the same whatever the training runs on."""
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


@dataclass(frozen=True)
class SampleDraw:
    """Everything that is random in one training sample."""

    vision_task: VisionTask
    row: int
    example_row: int
    has_text: bool
    has_example: bool
    generator: np.random.Generator
    """For what is left: timestep, the posterior's sample, noise."""


def draw_sample(config: TrainConfig, data: InContextData, index: int) -> SampleDraw:
    """Draw sample ``index`` of a training's stream: a function of (seed, index, sizes) alone."""
    generator = sample_generator(config.seed, index)
    vision_task = find_vision_task(config.vision_tasks[int(generator.integers(len(config.vision_tasks)))])
    is_map = vision_task.direction == "image_to_map"
    policies = config.image_to_map_examples if is_map else config.map_to_image_examples
    policy = list(policies)[int(generator.choice(len(policies), p=list(policies.values())))]
    row = row_at(config.seed, index, data.num_rows)
    example_row = data.choose_example(policy, row, generator)
    drop, u = config.dropout, generator.random()
    text = drop.text_image_to_map if is_map else drop.text_map_to_image
    first = text - drop.overlap  # the pair's interval begins inside the text's and reaches beyond it
    return SampleDraw(
        vision_task=vision_task,
        row=row,
        example_row=example_row,
        has_text=u >= text,
        has_example=config.method == "prompt_diffusion" and not first <= u < first + drop.example_pair,
        generator=generator,
    )


class InContextObjective:
    """The noise-prediction loss of Prompt Diffusion (arXiv 2305.01115, equation 2), or of CN(FT) with the query alone."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        controlnet: PromptDiffusionControlNet,
        data: InContextData,
        latents: Mapping[str | None, tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        """Take what the loss reads.

        ``latents``: posterior mean and std (rows of ``data``, C, h, w) by target condition, None for the photograph.
        """
        self.config, self.unet, self.controlnet, self.data = config, base.unet, controlnet, data
        self.latents, self.device, self.labels = latents, device, config.vision_tasks
        # zero terminal SNR, betas and prediction type are the base's own; the recipe was checked against them
        self.scheduler = DDPMScheduler.from_config(base.scheduler.config)
        texts = sorted(
            {"", *data.captions("edited"), *(find_vision_task(name).text or "" for name in config.vision_tasks)}
        )
        self.text_rows = {text: row for row, text in enumerate(texts)}
        self.text = encode_in_batches(base, texts)

    def prepare(self, indices: range) -> range:
        """Return the samples' indices."""
        return indices

    def compute_losses(self, indices: range) -> tuple[Tensor, list[int]]:
        """Return the loss of each sample and the position of its vision task."""
        draws = [draw_sample(self.config, self.data, index) for index in indices]
        samples = [self.data.assemble(d.vision_task, d.row, d.example_row) for d in draws]
        timesteps = [
            draw_timestep(d.generator, self.config.noise, self.scheduler.config["num_train_timesteps"]) for d in draws
        ]
        posteriors = [self._posterior(d) for d in draws]
        clean = torch.stack(
            [
                mean + std * sample_noise(d.generator, mean.shape)
                for d, (mean, std) in zip(draws, posteriors, strict=True)
            ]
        )
        noise = torch.stack([sample_noise(d.generator, clean[0].shape) for d in draws])
        texts = [self.text_rows[s.prompt if d.has_text else ""] for d, s in zip(draws, samples, strict=True)]

        clean, noise = clean.to(self.device), noise.to(self.device)
        steps = torch.tensor(timesteps, device=self.device)
        query = to_model_range(np.stack([s.query for s in samples])).to(self.device)
        pair = self._example_pairs(draws, samples)
        low = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            prediction = predict_noise(
                self.unet,
                self.controlnet,
                self.scheduler.add_noise(clean, noise, steps),
                steps,
                self.text[texts].to(self.device),
                self.controlnet.compute_condition_features(pair, query),
            )
        is_v = self.scheduler.config["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(clean, noise, steps) if is_v else noise
        losses = (prediction.float() - target).square().flatten(1).mean(dim=1)
        gamma = self.config.noise.min_snr_gamma
        if gamma is not None:
            schedule = self.scheduler.alphas_cumprod.to(self.device)
            losses = losses * weigh_by_snr(schedule, steps, gamma, self.scheduler.config["prediction_type"])
        return losses, [self.labels.index(d.vision_task.name) for d in draws]

    def _posterior(self, draw: SampleDraw) -> tuple[Tensor, Tensor]:
        mean, std = self.latents[draw.vision_task.target_condition]
        return mean[draw.row], std[draw.row]

    def _example_pairs(self, draws: Sequence[SampleDraw], samples: Sequence[Sample]) -> Tensor | None:
        """Return N, 6, H, W in [-1, 1], mid-grey (zeros) where the pair is dropped; None for a model without pairs."""
        if not self.controlnet.uses_example_pair:
            return None
        sources = to_model_range(np.stack([s.example_source for s in samples]))
        targets = to_model_range(np.stack([s.example_target for s in samples]))
        kept = torch.tensor([d.has_example for d in draws])[:, None, None, None]
        return (torch.cat([sources, targets], dim=1) * kept).to(self.device)


def encode_in_batches(base: Base, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Return text embeddings N, L, C of many texts, on the CPU."""
    return torch.cat([base.encode_text(texts[i : i + batch_size]).cpu() for i in range(0, len(texts), batch_size)])


def check_recipe(config: TrainConfig, base: Base) -> None:
    """Raise ValueError where the recipe and the base disagree, before any work."""
    expected = base.scheduler.config["prediction_type"]
    if config.noise.prediction_type != expected:
        raise ValueError(
            f"noise.prediction_type is {config.noise.prediction_type!r}, but base {config.base!r} was trained for {expected!r}"
        )
    stem_stride = 2 ** (len(config.stem_channels) - 1)
    if stem_stride != base.latent_stride:
        raise ValueError(
            f"stem_channels {config.stem_channels} shrink an image {stem_stride} times, the latents of base {config.base!r} "
            f"are {base.latent_stride} times smaller: give {base.latent_stride.bit_length()} channels"
        )
