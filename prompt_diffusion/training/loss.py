"""The denoising objective of Prompt Diffusion: the loss of each sample of a micro-batch."""

from collections.abc import Mapping

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from prompt_diffusion.data.transforms import to_model_range
from prompt_diffusion.engine.noise import compute_min_snr_weights
from prompt_diffusion.model.base import Base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, predict_noise
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import embed_texts
from prompt_diffusion.training.samples import BatchMaker, InContextBatch, TrainingData
from prompt_diffusion.vision_tasks import find_vision_task


class InContextObjective:
    """The noise-prediction loss of Prompt Diffusion (arXiv 2305.01115, equation 2), or of CN(FT) with the query alone."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        controlnet: PromptDiffusionControlNet,
        data: Mapping[str, TrainingData],
        device: torch.device,
        num_threads: int = 1,
    ) -> None:
        """Take the networks, already on the device, and the data of each vision task."""
        self.config, self.unet, self.controlnet = config, base.unet, controlnet
        self.device, self.labels = device, config.vision_tasks
        # betas, zero terminal SNR and prediction type are the base's own: check_recipe compares the recipe with them
        self.scheduler = DDPMScheduler.from_config(base.scheduler.config)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        texts = sorted({"", *(find_vision_task(name).text or "" for name in config.vision_tasks)})
        self.maker = BatchMaker(
            config,
            data,
            dict(zip(texts, embed_texts(base, texts), strict=True)),
            self.scheduler.config["num_train_timesteps"],
            num_threads,
            pins_memory=device.type == "cuda",
        )

    def prepare(self, indices: range) -> InContextBatch:
        """Return a micro-batch on the CPU; may be called from any thread."""
        return self.maker.make(indices)

    def compute_losses(self, batch: InContextBatch) -> tuple[Tensor, list[int]]:
        """Return the loss of each sample and the position of its vision task."""
        clean, noise, steps, text, has_example, queries = (
            part.to(self.device, non_blocking=True)
            for part in (batch.clean, batch.noise, batch.timesteps, batch.text, batch.has_example, batch.queries)
        )
        example_pairs = None
        if batch.example_pairs is not None:
            sides = [to_model_range(side.to(self.device, non_blocking=True)) for side in batch.example_pairs]
            example_pairs = torch.cat(sides, dim=1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            prediction = predict_noise(
                self.unet,
                self.controlnet,
                self.scheduler.add_noise(clean, noise, steps),
                steps,
                text,
                self.controlnet.compute_condition_features(example_pairs, to_model_range(queries), has_example),
            )
        is_v = self.scheduler.config["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(clean, noise, steps) if is_v else noise
        losses = (prediction.float() - target).square().flatten(1).mean(dim=1)
        gamma = self.config.noise.min_snr_gamma
        if gamma is not None:
            kind = self.scheduler.config["prediction_type"]
            losses = losses * compute_min_snr_weights(self.alphas_cumprod, steps, gamma, kind)
        return losses, batch.labels

    def close(self) -> None:
        """Stop the threads that fetch ahead."""
        self.maker.close()


def check_recipe(config: TrainConfig, base: Base) -> None:
    """Raise ValueError where the recipe and the base disagree."""
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
