"""Inference: a diffusers pipeline that does to the query what the example pair shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prompt_diffusion.data.transforms import Pixels, from_model_range, to_model_range
from prompt_diffusion.model.base import Base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, predict_noise

Images = Image.Image | Sequence[Image.Image] | Pixels
"""One image or a batch: PIL, or uint8 H, W, 3 or N, H, W, 3."""
OutputType = Literal["pil", "np", "uint8", "latent"]


class PromptDiffusionOutput(BaseOutput):  # type: ignore[misc]
    """What a call returns."""

    images: Any
    """PIL images (``pil``), float arrays in [0, 1] (``np``), uint8 arrays (``uint8``), or latents (``latent``)."""


class PromptDiffusionPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Prompt Diffusion by composition of diffusers' parts: one call turns a query into what its example pair shows."""

    model_cpu_offload_seq = "text_encoder->controlnet->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: PromptDiffusionControlNet,
        scheduler: DDIMScheduler,
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

    @classmethod
    def from_parts(cls, base: Base, controlnet: PromptDiffusionControlNet) -> Self:
        """Compose a pipeline from a base and a ControlNet."""
        return cls(base.vae, base.text_encoder, base.tokenizer, base.unet, controlnet, base.scheduler)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        example_pair: tuple[Images, Images] | None,
        query: Images,
        *,
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float = 7.5,
        num_inference_steps: int = 50,
        controlnet_conditioning_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
    ) -> PromptDiffusionOutput:
        """Generate one image a query.

        Args:
            prompt: One text, or one a query; "" lets the example pair decide alone.
            example_pair: (source, target) images, one pair or one a query; None stands for a mid-grey pair.
            query: The image or images to transform, of the pair's size.
            negative_prompt: Text of the unconditional branch, which keeps the example pair and the query, as published.
            guidance_scale: Guidance weight; 1 or less runs no unconditional branch.
            num_inference_steps: Denoising steps.
            controlnet_conditioning_scale: Weight of the ControlNet's residuals.
            generator: One generator a query makes an image independent of its batch.
            output_type: ``pil``, ``np`` (float N, H, W, 3 in [0, 1]), ``uint8`` (N, H, W, 3) or ``latent``.

        Raises:
            ValueError: Counts or sizes that do not fit together, named in one sentence.
        """
        queries = self._to_tensor(query)
        count = len(queries)
        pairs = None if example_pair is None else self._stack_pair(example_pair, queries)
        generators = (
            [generator] * count if isinstance(generator, torch.Generator) or generator is None else list(generator)
        )
        if len(generators) != count:
            raise ValueError(f"{len(generators)} generators were given for {count} queries: give one each")
        text = self._encode_texts(prompt, count, "prompt")
        features = self.controlnet.compute_condition_features(pairs, queries)
        is_guided = guidance_scale > 1.0
        if is_guided:
            text = torch.cat([self._encode_texts(negative_prompt, count, "negative_prompt"), text])
            features = torch.cat([features, features])

        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self._draw_latents(queries, generators) * self.scheduler.init_noise_sigma
        for step in self.progress_bar(self.scheduler.timesteps):
            entering = self.scheduler.scale_model_input(latents, step)
            entering = torch.cat([entering, entering]) if is_guided else entering
            noise_pred = predict_noise(
                self.unet, self.controlnet, entering, step, text, features, controlnet_conditioning_scale
            )
            if is_guided:
                unconditional, conditional = noise_pred.chunk(2)
                noise_pred = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise_pred, step, latents).prev_sample
        return PromptDiffusionOutput(images=self._decode(latents, output_type))

    def _to_tensor(self, images: Images) -> Tensor:
        """Return N, 3, H, W in [-1, 1] on the pipeline's device."""
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, np.ndarray):
            arrays = [np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images]
            if len({array.shape for array in arrays}) > 1:
                raise ValueError(f"images of one batch must have one size, got {sorted({a.shape for a in arrays})}")
            images = np.stack(arrays)
        images = images[None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are uint8 H, W, 3 or N, H, W, 3, got {images.dtype} {images.shape}")
        stride = 2 ** (len(self.vae.config.block_out_channels) - 1) * 2 ** (
            len(self.unet.config.block_out_channels) - 1
        )
        if images.shape[1] % stride or images.shape[2] % stride:
            raise ValueError(
                f"height and width must be multiples of {stride}, got {images.shape[1]} x {images.shape[2]}"
            )
        return to_model_range(images).to(self._execution_device, self.unet.dtype)

    def _stack_pair(self, example_pair: tuple[Images, Images], queries: Tensor) -> Tensor:
        """Return N, 6, H, W; one pair serves all queries."""
        source, target = (self._to_tensor(images) for images in example_pair)
        if source.shape != target.shape:
            raise ValueError(
                f"example source and target must have one size, got {tuple(source.shape)} and {tuple(target.shape)}"
            )
        pairs = torch.cat([source, target], dim=1)
        pairs = pairs.expand(len(queries), -1, -1, -1) if len(pairs) == 1 else pairs
        if len(pairs) != len(queries) or pairs.shape[2:] != queries.shape[2:]:
            raise ValueError(
                f"{len(pairs)} example pairs of {tuple(pairs.shape[2:])} pixels do not fit {len(queries)} queries of "
                f"{tuple(queries.shape[2:])}"
            )
        return pairs

    def _encode_texts(self, texts: str | Sequence[str], count: int, name: str) -> Tensor:
        texts = [texts] * count if isinstance(texts, str) else list(texts)
        if len(texts) != count:
            raise ValueError(f"{len(texts)} texts were given as {name} for {count} queries: give one, or one each")
        base = Base(self.vae, self.unet, self.text_encoder, self.tokenizer, self.scheduler)
        return base.encode_text(texts).to(self.unet.dtype)

    def _draw_latents(self, queries: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
        """Draw each image's latents from its own generator, on the CPU, so that a seed means the same everywhere."""
        stride = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (self.unet.config.in_channels, queries.shape[2] // stride, queries.shape[3] // stride)
        return torch.stack([torch.randn(shape, generator=each) for each in generators]).to(queries)

    def _decode(self, latents: Tensor, output_type: OutputType) -> Any:  # noqa: ANN401 - as many types as output types
        if output_type == "latent":
            return latents
        pixels = from_model_range(self.vae.decode(latents / self.vae.config.scaling_factor).sample)
        if output_type == "uint8":
            return pixels
        if output_type == "np":
            return pixels.astype(np.float32) / 255.0
        return [Image.fromarray(image) for image in pixels]


def load_pipeline(folder: Path, device: str = "cpu") -> PromptDiffusionPipeline:
    """Load a pipeline from a folder that ``save_pretrained`` wrote: safetensors and JSON alone, nothing is executed.

    ValueError names the folder where a part is missing.
    """
    missing = [
        name
        for name in ("vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler")
        if not (folder / name).is_dir()
    ]
    if missing:
        raise ValueError(f"{folder} is no Prompt Diffusion pipeline: it has no {', '.join(missing)}")
    parts: dict[str, Any] = {
        "vae": AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True),
        "controlnet": PromptDiffusionControlNet.from_pretrained(folder / "controlnet", use_safetensors=True),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    pipeline: PromptDiffusionPipeline = PromptDiffusionPipeline(**parts).to(device)
    for name in ("vae", "text_encoder", "unet", "controlnet"):
        getattr(pipeline, name).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
