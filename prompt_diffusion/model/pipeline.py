"""Inference: a diffusers pipeline that does to the query what the example pair shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import Tensor

from prompt_diffusion.model.conditions import Conditions, ExamplePairs, count_batch, read_conditions
from prompt_diffusion.model.contract import PipelineContract
from prompt_diffusion.model.controlnet import predict_noise
from prompt_diffusion.model.editing import EditingMixin
from prompt_diffusion.model.images import Images, OutputType, check_output_type, write_images
from prompt_diffusion.model.schedulers import check_scheduler, choose_step_options
from prompt_diffusion.model.text import encode_texts, warn_of_cut_texts

__all__ = ["Images", "OutputType", "PromptDiffusionOutput", "PromptDiffusionPipeline"]

Texts = str | Sequence[str]
Generators = torch.Generator | Sequence[torch.Generator] | None
StepEnd = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]
"""(pipeline, step, timestep, tensors) -> the tensors that it changes."""


class PromptDiffusionOutput(BaseOutput):  # type: ignore[misc]
    """What a call returns."""

    images: Any
    """PIL images (``pil``), float arrays N, H, W, 3 in [0, 1] (``np``), tensors N, 3, H, W in [0, 1] (``pt``), uint8 arrays
    (``uint8``), or latents (``latent``)."""


@dataclass(frozen=True)
class _Denoising:
    """What the denoising loop starts from."""

    prompt_embeds: Tensor
    """The unconditional branch's before the texts' where there is guidance."""
    features: Tensor
    """What the stems gave, one an image."""
    noise: Tensor
    generators: list[torch.Generator | None] | None
    num_inference_steps: int
    controlnet_conditioning_scale: float
    eta: float


class PromptDiffusionPipeline(EditingMixin, PipelineContract):
    """Prompt Diffusion by composition of diffusers' parts: one call turns a query into what its example pair shows.

    It keeps to what diffusers' own pipelines do: any scheduler (``pipeline.scheduler = UniPCMultistepScheduler.from_config(
    pipeline.scheduler.config)``), offloading, slicing, saving and loading.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts,
        example_pair: ExamplePairs,
        query: Images,
        *,
        negative_prompt: Texts | None = "",
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        controlnet_conditioning_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PromptDiffusionOutput:
        """Do to each query what its example pair shows.

        A batch is as many images as there are queries, prompts or pairs; of each, one serves all or there is one an image.

        Args:
            prompt: Text; "" lets the example pair decide alone. What the text encoder cannot read is logged.
            example_pair: (source, target), of one size; a list of such pairs, whose features are averaged; or None, which
                stands for a mid-grey pair. CN(FT) models take None alone.
            query: The images to transform.
            negative_prompt: Text of the unconditional branch, which keeps the example pair and the query, as published.
            guidance_scale: Guidance weight; 1 or less runs no unconditional branch. None takes the model's own, and 1 where
                every prompt is its negative prompt: guidance compares the two texts, and would find no difference.
            num_inference_steps: Denoising steps; None takes the model's own.
            controlnet_conditioning_scale: Weight of the ControlNet's residuals.
            num_images_per_prompt: Images for each of the batch, next to each other in the output.
            eta: DDIM's share of fresh noise; other schedulers have none.
            generator: One an image makes an image independent of its batch; one alone serves all in turn.
            height: Pixels of the output; None takes the query's. Images of another size are cut to its aspect around their
                centre, as in training, and resized once, by Lanczos.
            width: As height.
            output_type: ``pil``, ``np``, ``pt``, ``uint8`` or ``latent``.
            return_dict: False returns a tuple.
            callback_on_step_end: Called after each step with the pipeline, the step, the timestep and a dictionary of
                tensors, as in diffusers; what it returns replaces them. ``pipeline._interrupt = True`` ends the steps.
            callback_on_step_end_tensor_inputs: Which tensors: ``latents``, ``prompt_embeds``.

        Raises:
            ValueError: What does not fit together or cannot be read, in one sentence.
        """
        check_output_type(output_type)
        check_scheduler(self.scheduler)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_tensor_names(callback_on_step_end_tensor_inputs)
        steps = self._choose_steps(num_inference_steps, num_images_per_prompt)
        conditions = read_conditions(query, example_pair, height, width, self.latent_stride)
        prompts, negatives = _list_texts(prompt, "prompt"), _list_texts(negative_prompt or "", "negative_prompt")
        given = {"texts as prompt": len(prompts), "texts as negative_prompt": len(negatives)}
        count = count_batch(len(conditions.queries), {"example pairs": conditions.num_pairs, **given})
        prompts, negatives = (texts * count if len(texts) == 1 else texts for texts in (prompts, negatives))
        if guidance_scale is None:
            guidance_scale = 1.0 if prompts == negatives else self.default_guidance_scale
        self._guidance_scale, self._interrupt = guidance_scale, False
        generators = _list_generators(generator, count * num_images_per_prompt)
        try:
            start = _Denoising(
                prompt_embeds=self._encode_prompts(prompts, negatives, num_images_per_prompt),
                features=self._compute_features(conditions, count, num_images_per_prompt),
                noise=self._draw_noise(conditions, generators),
                generators=None if generator is None else generators,
                num_inference_steps=steps,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                eta=eta,
            )
            latents = self._denoise(start, callback_on_step_end, callback_on_step_end_tensor_inputs)
            images = latents if output_type == "latent" else write_images(self._decode(latents), output_type)
        finally:  # also after an error: memory is given back
            self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)  # type: ignore[return-value]  # what diffusers' pipelines do, and few ask for
        return PromptDiffusionOutput(images=images)

    def _check_tensor_names(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(unknown)}"
            )

    def _choose_steps(self, num_inference_steps: int | None, num_images_per_prompt: int) -> int:
        steps = self.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        largest = self.scheduler.config.num_train_timesteps
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if not 1 <= steps <= largest:
            raise ValueError(f"num_inference_steps must be between 1 and {largest}, got {steps}")
        return steps

    def _encode_prompts(self, prompts: Sequence[str], negatives: Sequence[str], num_images_per_prompt: int) -> Tensor:
        """Return N, L, C; with guidance 2 N, the negative prompts first."""
        texts = {"prompt": prompts}
        if self.do_classifier_free_guidance:
            texts = {"negative_prompt": negatives, **texts}
        embeds = []
        for name, given in texts.items():
            warn_of_cut_texts(self.tokenizer, given, name)
            encoded = encode_texts(self.tokenizer, self.text_encoder, given, self._execution_device)
            embeds.append(encoded.to(self.unet.dtype).repeat_interleave(num_images_per_prompt, dim=0))
        return torch.cat(embeds)

    def _compute_features(self, conditions: Conditions, count: int, num_images_per_prompt: int) -> Tensor:
        """Return the stems' features, N, C, h, w, each pair and query seen once."""
        device, dtype = self._execution_device, self.unet.dtype
        pairs = None if conditions.pairs is None else [pair.to(device, dtype) for pair in conditions.pairs]
        features: Tensor = self.controlnet.compute_condition_features(pairs, conditions.queries.to(device, dtype))
        if len(features) != count:
            features = features.expand(count, -1, -1, -1)
        if num_images_per_prompt > 1:
            features = features.repeat_interleave(num_images_per_prompt, dim=0)
        return features

    def _draw_noise(self, conditions: Conditions, generators: Sequence[torch.Generator | None]) -> Tensor:
        """Draw each image's noise from its own generator, on the CPU unless that lives elsewhere: a seed means the same."""
        height, width = (side // self.latent_stride for side in conditions.queries.shape[2:])
        shape = (int(self.unet.config.in_channels), height, width)
        drawn = [
            torch.randn(shape, generator=each, device="cpu" if each is None else each.device) for each in generators
        ]
        return torch.stack(drawn).to(self._execution_device, self.unet.dtype)

    def _denoise(self, start: _Denoising, end_of_step: StepEnd | None, tensor_names: Sequence[str]) -> Tensor:
        """Return the latents after all steps, N, 4, h, w; the scheduler's state begins anew."""
        scheduler = self.scheduler
        scheduler.set_timesteps(start.num_inference_steps, device=self._execution_device)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # schedulers of second order take several timesteps a step
        num_warmup = len(timesteps) - start.num_inference_steps * scheduler.order
        doubled = torch.cat([start.features, start.features]) if self.do_classifier_free_guidance else start.features
        tensors = {"latents": start.noise * scheduler.init_noise_sigma, "prompt_embeds": start.prompt_embeds}
        with self.progress_bar(total=start.num_inference_steps) as bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                features = doubled if self.do_classifier_free_guidance else start.features
                tensors["latents"] = self._step(start, timestep, features, **tensors)
                if end_of_step is not None:
                    shown = {name: tensors[name] for name in tensor_names}
                    changed = end_of_step(self, index, timestep, shown) or {}
                    tensors |= {name: changed[name] for name in tensors if name in changed}
                if index == len(timesteps) - 1 or (index + 1 > num_warmup and (index + 1) % scheduler.order == 0):
                    bar.update()
        denoised: Tensor = tensors["latents"]
        return denoised

    def _step(
        self, start: _Denoising, timestep: Tensor, features: Tensor, latents: Tensor, prompt_embeds: Tensor
    ) -> Tensor:
        """Return the latents one step less noisy; both branches in one pass."""
        is_guided = self.do_classifier_free_guidance
        entering = self.scheduler.scale_model_input(latents, timestep)
        entering = torch.cat([entering, entering]) if is_guided else entering
        noise_pred = predict_noise(
            self.unet,
            self.controlnet,
            entering,
            timestep,
            prompt_embeds,
            features,
            start.controlnet_conditioning_scale,
        )
        if is_guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + self.guidance_scale * (conditional - unconditional)
        options = choose_step_options(self.scheduler, start.eta, start.generators)
        stepped: Tensor = self.scheduler.step(noise_pred, timestep, latents, **options, return_dict=False)[0]
        return stepped.to(latents.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return images


def _list_texts(texts: Texts, name: str) -> list[str]:
    listed: list[Any] = list(texts) if isinstance(texts, list | tuple) else [texts]
    wrong = [type(text).__name__ for text in listed if not isinstance(text, str)]
    if wrong or not listed:
        raise ValueError(f"{name} is a text or a list of texts, got {wrong[0] if wrong else 'an empty list'}")
    return listed


def _list_generators(generator: Generators, count: int) -> list[torch.Generator | None]:
    """Return one generator an image; one alone serves all, one after the other."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators were given for {count} images: give one each")
    return list(generator)
