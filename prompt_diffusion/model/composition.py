"""What a pipeline is composed of, and what its parts do outside of the steps: defaults, sizes, texts, decoding."""

from typing import Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prompt_diffusion.model.arguments import check_count
from prompt_diffusion.model.base import Base, compute_latent_stride
from prompt_diffusion.model.conditions import count_batch
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.defaults import settle_defaults
from prompt_diffusion.model.text import CallTexts, Texts, check_clip_skip, read_texts


class ComposedPipeline(
    TextualInversionLoaderMixin,  # type: ignore[misc]
    StableDiffusionLoraLoaderMixin,  # type: ignore[misc]
    StableDiffusionMixin,  # type: ignore[misc]
    DiffusionPipeline,  # type: ignore[misc]
):
    """Diffusers' parts and our ControlNet as one pipeline: its defaults and the state of its call, but not the call."""

    # as in diffusers' ControlNet pipelines, the ControlNet is not in the chain: it takes turns with the UNet every step
    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: PromptDiffusionControlNet,
        scheduler: SchedulerMixin,
        default_num_inference_steps: int | None = None,
        default_guidance_scale: float | None = None,
        default_image_size: int | None = None,
    ) -> None:
        """Compose a pipeline of its parts; a default that is None is the one that the ControlNet last worked with."""
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
        )
        defaults = settle_defaults(controlnet, default_num_inference_steps, default_guidance_scale, default_image_size)
        self.register_to_config(
            default_num_inference_steps=defaults.num_inference_steps,
            default_guidance_scale=defaults.guidance_scale,
            default_image_size=defaults.image_size,
        )
        self._guidance_scale = defaults.guidance_scale
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_parts(
        cls,
        base: Base,
        controlnet: PromptDiffusionControlNet,
        default_num_inference_steps: int | None = None,
        default_guidance_scale: float | None = None,
        default_image_size: int | None = None,
    ) -> Self:
        """Compose a pipeline from a base and a ControlNet."""
        parts = (base.vae, base.text_encoder, base.tokenizer, base.unet, controlnet, base.scheduler)
        return cls(*parts, default_num_inference_steps, default_guidance_scale, default_image_size)

    @property
    def default_num_inference_steps(self) -> int:
        """Denoising steps where a call does not say."""
        return int(self.config.default_num_inference_steps)

    @property
    def default_guidance_scale(self) -> float:
        """Guidance weight where a call does not say."""
        return float(self.config.default_guidance_scale)

    @property
    def latent_stride(self) -> int:
        """Pixels along one side of an image for each latent along one side."""
        return compute_latent_stride(self.vae.config)

    @property
    def image_size(self) -> int:
        """Pixels a side that the model was trained at; where it was saved without that, what its UNet was made for."""
        return int(self.config.default_image_size or self.unet.config.sample_size * self.latent_stride)

    @property
    def guidance_scale(self) -> float:
        """Guidance weight of the call that runs, or ran last."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the step that runs compares with the unconditional branch; a callback may set ``_guidance_scale``."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the call that runs, or ran last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback may set ``_interrupt``."""
        return self._interrupt

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Texts,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts | None = None,
        *,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings N, L, C of texts and of their negative prompts (None without guidance) as a call takes them."""
        texts = self._read_texts(prompt, None, negative_prompt, None)
        texts = texts.repeat(count_batch(1, {"prompts": len(texts.prompts), "negative prompts": len(texts.negatives)}))
        embeds = texts.encode(
            self.tokenizer,
            self.text_encoder,
            device or self._execution_device,
            self.unet.dtype,
            do_classifier_free_guidance,
            check_clip_skip(clip_skip, self.text_encoder),
        ).repeat_interleave(check_count("num_images_per_prompt", num_images_per_prompt), dim=0)
        if not do_classifier_free_guidance:
            return embeds, None
        negatives, prompts = embeds.chunk(2)
        return prompts, negatives

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time: less memory for a batch."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all images at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images tile by tile: less memory, faint seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode each image whole."""
        self.vae.disable_tiling()

    def _read_texts(
        self, prompt: object, prompt_embeds: object, negative_prompt: object, negative_prompt_embeds: object
    ) -> CallTexts:
        channels = int(self.unet.config.cross_attention_dim)
        texts = read_texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, channels)
        if set(self.tokenizer.added_tokens_encoder) <= set(self.tokenizer.all_special_tokens):
            return texts  # no word was learned by textual inversion
        return texts.convert(lambda text: self.maybe_convert_prompt(text, self.tokenizer))

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return images
