"""Inference: a diffusers pipeline that does to the query what the example pair shows."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from prompt_diffusion.model.arguments import (
    Generators,
    check_callback,
    check_count,
    check_number,
    check_sampler_options,
    list_generators,
)
from prompt_diffusion.model.composition import ComposedPipeline
from prompt_diffusion.model.conditions import ExamplePairs, count_batch, read_conditions
from prompt_diffusion.model.denoising import Start, StepEnd, check_latents, compute_features, denoise, draw_noise
from prompt_diffusion.model.editing import edit_by_text
from prompt_diffusion.model.images import Images, OutputType, check_output_type, write_images
from prompt_diffusion.model.outputs import EditingOutput, PromptDiffusionOutput
from prompt_diffusion.model.schedulers import check_scheduler
from prompt_diffusion.model.text import Texts, check_clip_skip


class PromptDiffusionPipeline(ComposedPipeline):
    """Prompt Diffusion by composition of diffusers' parts: one call turns a query into what its example pair shows.

    It keeps to what diffusers' own pipelines do: any scheduler (``pipeline.scheduler = UniPCMultistepScheduler.from_config(
    pipeline.scheduler.config)``), LoRA and textual inversion, offloading, slicing, saving and loading. ``docs/generation.md``
    lists what it does not take.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds")

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        example_pair: ExamplePairs = None,
        query: Images | None = None,
        *,
        image: Images | None = None,
        negative_prompt: Texts | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_inference_steps: int | None = None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        clip_skip: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PromptDiffusionOutput:
        """Do to each query what its example pair shows.

        A batch is as many images as there are queries, prompts or pairs; a single one serves all, or there is one per image.

        Args:
            prompt: Text; "" lets the example pair decide alone. What the text encoder cannot read is logged.
            example_pair: (source, target), of one size; a list of such pairs, whose features are averaged; or None, which
                stands for a mid-grey pair. CN(FT) models accept only None.
            query: The images to transform.
            image: The same, under the name that diffusers' ControlNet pipelines use.
            negative_prompt: Text of the unconditional branch, which keeps the example pair and the query, as published.
            prompt_embeds: N, L, C in place of the prompt, such as ``encode_prompt`` gives.
            negative_prompt_embeds: N, L, C in place of the negative prompt.
            guidance_scale: Guidance weight; 1 or less runs no unconditional branch. None takes the model's own, and 1 where
                every prompt is its negative prompt: guidance compares the two texts, and would find no difference.
            guidance_rescale: How far the guided prediction is brought back to the spread of the conditional one, 0 to 1
                (arXiv 2305.08891, section 3.4).
            num_inference_steps: Denoising steps; None takes the model's own.
            controlnet_conditioning_scale: Weight of the ControlNet's residuals.
            control_guidance_start: The fraction of the steps before which the ControlNet is off, 0 to 1.
            control_guidance_end: The fraction of the steps after which it is off.
            num_images_per_prompt: Images for each of the batch, next to each other in the output.
            eta: DDIM's share of fresh noise; other schedulers have none.
            generator: One for each image makes an image independent of its batch; one alone serves all in turn.
            latents: The noise to start from, of variance 1: images, channels, height and width in latents. None draws it.
            clip_skip: How many of the text encoder's last layers are left out.
            height: Pixels of the output; None takes ``image_size``, what the model was trained at. Images of another size are
                cut to its aspect around their centre, as in training, and resized once, by Lanczos.
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
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        options = check_sampler_options(
            self.default_num_inference_steps if num_inference_steps is None else num_inference_steps,
            self.scheduler.config.num_train_timesteps,
            eta,
            guidance_rescale,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
        )
        repeats = check_count("num_images_per_prompt", num_images_per_prompt)
        height, width = (
            self.image_size if side is None else check_count(name, side)
            for name, side in (("height", height), ("width", width))
        )
        conditions = read_conditions(_choose_query(query, image), example_pair, height, width, self.latent_stride)
        clip_skip = check_clip_skip(clip_skip, self.text_encoder)
        texts = self._read_texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        given = {
            "example pairs": conditions.num_example_pairs,
            "texts as prompt": len(texts.prompts),
            "texts as negative_prompt": len(texts.negatives),
        }
        count = count_batch(len(conditions.queries), given)
        texts = texts.repeat(count)
        if guidance_scale is None:
            guidance_scale = 1.0 if texts.are_equal else self.default_guidance_scale
        self._guidance_scale, self._interrupt = check_number("guidance_scale", guidance_scale), False
        generators = list_generators(generator, count * repeats)
        shape = (int(self.unet.config.in_channels), height // self.latent_stride, width // self.latent_stride)
        noise = draw_noise(shape, generators) if latents is None else check_latents(latents, shape, count * repeats)
        device, dtype = self._execution_device, self.unet.dtype
        try:
            embeds = texts.encode(
                self.tokenizer, self.text_encoder, device, dtype, self.do_classifier_free_guidance, clip_skip
            )
            start = Start(
                prompt_embeds=embeds.repeat_interleave(repeats, dim=0),
                features=compute_features(self.controlnet, conditions, device, dtype, count, repeats),
                latents=noise.to(device, dtype),
                generators=None if generator is None else generators,
                options=options,
            )
            denoised = denoise(self, start, device, callback_on_step_end, callback_on_step_end_tensor_inputs)
            images = denoised if output_type == "latent" else write_images(self._decode(denoised), output_type)
        finally:  # also after an error: memory is freed
            self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)  # type: ignore[return-value]  # what diffusers' pipelines do, and few ask for
        return PromptDiffusionOutput(images=images)

    def edit(
        self,
        image: Images,
        prompt: Texts | None = None,
        *,
        condition: str = "depth",
        example_pair: ExamplePairs = None,
        map_guidance_scale: float | None = None,
        map_num_inference_steps: int | None = None,
        output_type: OutputType = "pil",
        **options: Any,  # noqa: ANN401 - a plain call's
    ) -> EditingOutput:
        """Recreate a picture, keeping its layout: image to condition map, then map to image with a new caption.

        Args:
            image: The pictures to edit.
            prompt: What the new ones show.
            condition: What is kept of the pictures: ``depth``, ``hed``, ``seg``, or another that the model was trained on.
            example_pair: (picture, its map), or a list of them: shown as given in the first step and reversed in the second.
                With None the text alone ("depth map") decides which map is made.
            map_guidance_scale: Guidance weight of the first step; None takes that of the second.
            map_num_inference_steps: Denoising steps of the first step; None takes those of the second.
            output_type: As for a plain call, for pictures and maps.
            options: Further arguments of a plain call; in a list of generators, each draws both steps of its image.

        Raises:
            ValueError: As a plain call, and for a condition without a vision task.
        """
        own = {"guidance_scale": map_guidance_scale, "num_inference_steps": map_num_inference_steps}
        return edit_by_text(self, image, prompt, condition, example_pair, own, output_type, options)

    def edit_by_example(
        self,
        image: Images,
        before: Images,
        after: Images,
        prompt: Texts | None = "",
        **options: Any,  # noqa: ANN401 - a plain call's
    ) -> PromptDiffusionOutput:
        """Do to pictures what was done between ``before`` and ``after``: a plain call with that example pair."""
        return self(prompt, (before, after), image, **options)


def _choose_query(query: Images | None, image: Images | None) -> Images:
    """Return the images to transform, whichever of the two arguments was used."""
    if query is not None and image is not None:
        raise ValueError("query and image are two names of one argument: give one of them")
    if query is None and image is None:
        raise ValueError("give query, the images to transform (image, as diffusers calls it, does as well)")
    return image if query is None else query  # type: ignore[return-value]  # one of them is there
