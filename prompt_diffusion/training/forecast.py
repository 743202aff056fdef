"""What a training would cost, before it runs: arithmetic, memory, checkpoints, time.

Networks are built at their real size on fake tensors, which have a shape and no content, and one training step is run on
them: torch counts the operations, and the tensors that autograd saves for the backward pass are added up.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from prompt_diffusion.building import builds_networks
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.optimizer import estimate_state_bytes
from prompt_diffusion.model.base import compute_latent_stride
from prompt_diffusion.model.controlnet import (
    EXAMPLE_PAIR_CHANNELS,
    QUERY_CHANNELS,
    PromptDiffusionControlNet,
    predict_noise,
    trained_unet_parameters,
)
from prompt_diffusion.model.references import SD_V1_5, base_folder
from prompt_diffusion.training.config import TrainConfig

ASSUMED_TERAFLOPS: Mapping[Literal["float32", "bfloat16"], float] = {"bfloat16": 300.0, "float32": 40.0}
"""Sustained TFLOP/s of a training on one H100, by precision: assumed, not measured."""

_SD15_REPOSITORIES = (SD_V1_5, "runwayml/stable-diffusion-v1-5")
_SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD15_TEXT: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class BaseLayout:
    """The shapes of a base, without its weights."""

    source: str
    """Where the shapes were found."""
    unet: Mapping[str, Any]
    text: Mapping[str, Any]
    latent_stride: int


@dataclass(frozen=True)
class StepCount:
    """The operations and saved tensors of one training step."""

    gigaflop: float
    saved_bytes: int
    """What autograd saves for the backward pass."""


@dataclass(frozen=True)
class Forecast:
    """What a training would cost; bytes are those of one process."""

    layout: str
    trained_parameters: int
    frozen_parameters: int
    num_steps: int
    num_samples: int
    gigaflop_per_sample: float
    """Forward and backward pass of what the recipe trains, recomputation by gradient checkpointing included."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    autocast_bytes: int
    """Low-precision copies of the weights that autocast keeps during a step, whatever the number of samples."""
    activations_bytes_per_sample: int
    """What autograd saves for the backward pass, with fused attention and without gradient checkpointing."""
    micro_batch_size: int
    """As configured, else the process's whole share of the batch."""
    checkpoint_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All tensors on the device; workspaces and fragmentation come on top."""
        state = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.ema_bytes
        return state + self.autocast_bytes + self.micro_batch_size * self.activations_bytes_per_sample

    def predict_seconds(self, teraflops: float, num_processes: int) -> float:
        """Return the time of all steps at these sustained TFLOP/s of each process, without loading and saving."""
        return self.num_samples * self.gigaflop_per_sample / (teraflops * 1e3 * num_processes)


def forecast_training(config: TrainConfig, resources: TrainResources, image_size: int) -> Forecast:
    """Return what a training on square images of this size would cost; ValueError where its base is not on this machine."""
    layout = read_layout(config.base)
    with FakeTensorMode():
        unet, controlnet = _build_networks(config, layout)
        text_encoder = CLIPTextModel(CLIPTextConfig(**layout.text))
        frozen = [*(p for p in unet.parameters() if not p.requires_grad), *text_encoder.parameters()]
        trained = {name: p for part in (unet, controlnet) for name, p in part.named_parameters() if p.requires_grad}
        plain = [_count_step(config, layout, unet, controlnet, image_size, samples) for samples in (1, 2)]
        counted = plain
        if resources.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            controlnet.enable_gradient_checkpointing()
            counted = [_count_step(config, layout, unet, controlnet, image_size, samples) for samples in (1, 2)]
    per_sample = plain[1].saved_bytes - plain[0].saved_bytes
    trained_bytes = sum(p.nbytes for p in trained.values())
    optimizer_bytes = estimate_state_bytes(trained, config.optimizer)
    ema_bytes = trained_bytes if config.optimizer.ema_decay is not None else 0
    share = -(-config.batch_size // resources.num_processes)
    return Forecast(
        layout=layout.source,
        trained_parameters=trained_bytes // _FLOAT_BYTES,
        frozen_parameters=sum(p.numel() for p in frozen),
        num_steps=config.num_steps,
        num_samples=config.num_steps * config.batch_size,
        gigaflop_per_sample=counted[1].gigaflop - counted[0].gigaflop,
        weights_bytes=trained_bytes + sum(p.nbytes for p in frozen),
        gradients_bytes=trained_bytes,
        optimizer_bytes=optimizer_bytes,
        ema_bytes=ema_bytes,
        autocast_bytes=plain[0].saved_bytes - per_sample,
        activations_bytes_per_sample=per_sample,
        micro_batch_size=min(resources.device_batch_size or share, share),
        checkpoint_bytes=trained_bytes + optimizer_bytes + ema_bytes,
    )


def read_layout(base: str) -> BaseLayout:
    """Return the shapes of a base: SD v1.5's are built in, others are read from its configuration on this machine."""
    if base.partition("@")[0] in _SD15_REPOSITORIES:
        return BaseLayout("Stable Diffusion v1.5's published layout", _SD15_UNET, _SD15_TEXT, 8)
    folder = Path(base_folder(base) or base)
    parts: dict[str, Any] = {}
    for name in ("unet", "text_encoder", "vae"):
        file = folder / name / "config.json"
        if not file.is_file():
            raise ValueError(f"base {base!r} cannot be forecast: {file} is not on this machine")
        parts[name] = json.loads(file.read_text())
    stride = compute_latent_stride(parts["vae"])
    return BaseLayout(f"the configuration of {base!r}", parts["unet"], parts["text_encoder"], stride)


@builds_networks
def _build_networks(config: TrainConfig, layout: BaseLayout) -> tuple[UNet2DConditionModel, PromptDiffusionControlNet]:
    """Build both networks; the parameters that the recipe trains require gradients."""
    unet = UNet2DConditionModel.from_config(dict(layout.unet)).requires_grad_(False)
    controlnet: PromptDiffusionControlNet = PromptDiffusionControlNet.from_unet(
        unet, config.stem_channels, example_pair=config.method == "prompt_diffusion"
    )
    controlnet.train().requires_grad_(True)
    if config.train_decoder:
        for parameter in trained_unet_parameters(unet).values():
            parameter.requires_grad_(True)
    return unet, controlnet


def _count_step(
    config: TrainConfig,
    layout: BaseLayout,
    unet: UNet2DConditionModel,
    controlnet: PromptDiffusionControlNet,
    image_size: int,
    samples: int,
) -> StepCount:
    """Count the forward and backward pass of a step; called in a fake tensor mode."""
    weights = {p.untyped_storage()._cdata for part in (unet, controlnet) for p in part.parameters()}
    saved: dict[int, Any] = {}  # the storages themselves: the address of a freed one would be used again

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    size = image_size // layout.latent_stride
    latents = torch.zeros(samples, layout.unet["in_channels"], size, size)
    text = torch.zeros(samples, layout.text["max_position_embeddings"], layout.text["hidden_size"])
    query = torch.zeros(samples, QUERY_CHANNELS, image_size, image_size)
    pair = torch.zeros(samples, EXAMPLE_PAIR_CHANNELS, image_size, image_size) if controlnet.uses_example_pair else None
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            steps, features = torch.zeros(samples).long(), controlnet.compute_condition_features(pair, query)
            prediction = predict_noise(unet, controlnet, latents, steps, text, features)
        prediction.float().square().mean().backward()  # type: ignore[no-untyped-call]
    for parameter in (*unet.parameters(), *controlnet.parameters()):
        parameter.grad = None
    return StepCount(counter.get_total_flops() / 1e9, sum(storage.nbytes() for storage in saved.values()))
