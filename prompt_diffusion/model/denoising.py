"""From noise to latents: where the steps start, and the loop that takes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from prompt_diffusion.model.arguments import SamplerOptions
from prompt_diffusion.model.conditions import Conditions
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, predict_noise
from prompt_diffusion.model.schedulers import choose_step_options

StepEnd = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]
"""(pipeline, step, timestep, tensors) -> the tensors that it changes."""


class Denoiser(Protocol):
    """What the loop needs of a pipeline; a callback may change its guidance and interrupt it between two steps."""

    unet: UNet2DConditionModel
    controlnet: PromptDiffusionControlNet
    scheduler: SchedulerMixin
    _num_timesteps: int

    @property
    def guidance_scale(self) -> float:
        """Guidance weight of the step that runs."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the step that runs compares with the unconditional branch."""

    @property
    def interrupt(self) -> bool:
        """Whether the steps that are left are left out."""

    def progress_bar(self, *, total: int) -> Any:  # noqa: ANN401 - diffusers' own
        """Return a context that counts the steps."""


@dataclass(frozen=True)
class Start:
    """What the denoising loop starts from."""

    prompt_embeds: Tensor
    """The unconditional branch's before the texts' where there is guidance."""
    features: Tensor
    """What the stems gave, one for each image."""
    latents: Tensor
    """Noise of variance 1: N, 4, h, w."""
    generators: list[torch.Generator | None] | None
    options: SamplerOptions


def compute_features(
    controlnet: PromptDiffusionControlNet,
    conditions: Conditions,
    device: torch.device,
    dtype: torch.dtype,
    count: int,
    num_images_per_prompt: int,
) -> Tensor:
    """Return the stems' features, N, C, h, w, each pair and query seen once."""
    example_pairs = (
        None if conditions.example_pairs is None else [pair.to(device, dtype) for pair in conditions.example_pairs]
    )
    features: Tensor = controlnet.compute_condition_features(example_pairs, conditions.queries.to(device, dtype))
    if len(features) != count:
        features = features.expand(count, -1, -1, -1)
    if num_images_per_prompt > 1:
        features = features.repeat_interleave(num_images_per_prompt, dim=0)
    return features


def draw_noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator | None]) -> Tensor:
    """Draw each image's noise from its own generator, on the CPU unless that lives elsewhere: a seed means the same."""
    return torch.stack(
        [torch.randn(shape, generator=each, device="cpu" if each is None else each.device) for each in generators]
    )


def check_latents(latents: object, shape: tuple[int, int, int], count: int) -> Tensor:
    """Return the noise that a call brought; ValueError where it is none of ``count`` images of that shape."""
    wanted = (count, *shape)
    if not isinstance(latents, Tensor) or tuple(latents.shape) != wanted:
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents is a tensor {wanted}: images, channels, and sides in latents; got {found}")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents has values that are not finite")
    return latents


def denoise(
    pipeline: Denoiser, start: Start, device: torch.device, end_of_step: StepEnd | None, tensor_names: Sequence[str]
) -> Tensor:
    """Return the latents after all steps, N, 4, h, w; the scheduler's state begins anew."""
    scheduler, num_steps = pipeline.scheduler, start.options.num_inference_steps
    scheduler.set_timesteps(num_steps, device=device)
    timesteps = scheduler.timesteps
    count = pipeline._num_timesteps = len(timesteps)
    # schedulers of second order take several timesteps a step
    num_warmup = count - num_steps * scheduler.order
    doubled = torch.cat([start.features, start.features]) if pipeline.do_classifier_free_guidance else start.features
    tensors = {"latents": start.latents * scheduler.init_noise_sigma, "prompt_embeds": start.prompt_embeds}
    with pipeline.progress_bar(total=num_steps) as bar:
        for index, timestep in enumerate(timesteps):
            if pipeline.interrupt:
                continue
            features = doubled if pipeline.do_classifier_free_guidance else start.features
            weight = start.options.weigh_controlnet(index, count)
            tensors["latents"] = _step(pipeline, start, timestep, features, weight, **tensors)
            if end_of_step is not None:
                shown = {name: tensors[name] for name in tensor_names}
                changed = end_of_step(pipeline, index, timestep, shown) or {}
                tensors |= {name: changed[name] for name in tensors if name in changed}
            if index == count - 1 or (index + 1 > num_warmup and (index + 1) % scheduler.order == 0):
                bar.update()
    denoised: Tensor = tensors["latents"]
    return denoised


def _step(
    pipeline: Denoiser,
    start: Start,
    timestep: Tensor,
    features: Tensor,
    weight: float,
    latents: Tensor,
    prompt_embeds: Tensor,
) -> Tensor:
    """Return the latents one step less noisy; both branches in one pass."""
    is_guided, scheduler, options = pipeline.do_classifier_free_guidance, pipeline.scheduler, start.options
    entering = scheduler.scale_model_input(latents, timestep)
    entering = torch.cat([entering, entering]) if is_guided else entering
    noise_pred = predict_noise(pipeline.unet, pipeline.controlnet, entering, timestep, prompt_embeds, features, weight)
    if is_guided:
        unconditional, conditional = noise_pred.chunk(2)
        noise_pred = unconditional + pipeline.guidance_scale * (conditional - unconditional)
        if options.guidance_rescale > 0.0:
            noise_pred = rescale_noise_cfg(noise_pred, conditional, options.guidance_rescale)
    taken = choose_step_options(scheduler, options.eta, start.generators)
    stepped: Tensor = scheduler.step(noise_pred, timestep, latents, **taken, return_dict=False)[0]
    return stepped.to(latents.dtype)
