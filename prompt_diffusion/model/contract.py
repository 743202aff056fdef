"""What users of diffusers expect of a pipeline beside its call: parts, defaults, properties, memory options."""

from typing import Self

from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from prompt_diffusion.model.base import Base, compute_latent_stride
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet

DEFAULT_NUM_INFERENCE_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 7.5
"""The defaults of a model that was saved without its own."""


class PipelineContract(DiffusionPipeline):  # type: ignore[misc]
    """The parts of Prompt Diffusion, and how pictures are made with them where a call does not say."""

    # as in diffusers' ControlNet pipelines, the ControlNet is not in the chain: it takes turns with the UNet every step
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: PromptDiffusionControlNet,
        scheduler: SchedulerMixin,
        default_num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        default_guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        default_image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_image_size=default_image_size,
        )
        self._guidance_scale = default_guidance_scale
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_parts(
        cls,
        base: Base,
        controlnet: PromptDiffusionControlNet,
        default_num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        default_guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
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
        """Whether the steps that are left are left out; a callback may set ``_interrupt``."""
        return self._interrupt

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
