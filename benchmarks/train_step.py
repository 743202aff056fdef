"""Claim: our training step is faster than the published one, on the same model, samples and machine.

The published step, written plainly with diffusers: float32, gradient checkpointing, autoencoder and text encoder in every
step. Ours: stored posteriors and text embeddings, no checkpointing, fused AdamW; on a GPU bfloat16 autocast besides. Both train
a ControlNet with both stems and the UNet's decoder. On a CPU the model has SD v1.5's layout at a fifth of its width, on a GPU
its real size; weights are random. Also reported: the arithmetic of a sample, and what share of a matrix product's speed ours
reaches. The last line is one JSON object.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measuring import add_out_option, compare, describe_device, find_versions, finish, synchronise, take_turns
from _networks import IMAGE_SIZE, build_base
from diffusers import DDPMScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.data.transforms import to_model_range
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.noise import draw_timestep, sample_noise
from prompt_diffusion.engine.optimizer import build_optimizers
from prompt_diffusion.model.base import Base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, predict_noise
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import (
    Encode,
    EncodeConfig,
    EncodeResources,
    EncodeText,
)
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.loss import InContextObjective
from prompt_diffusion.training.rows import TrainingData, open_training_data
from prompt_diffusion.training.samples import draw_sample
from prompt_diffusion.training.train import build_controlnet, place_networks, select_parameters

CONDITIONS = ("depth", "hed", "seg")


def make_inputs(num_groups: int, base: str, folder: str) -> TrainInputs:
    """Return ray-cast scenes at 256 px with their exact maps, their latents and their text embeddings, sealed in a folder."""
    config = IngestConfig(
        source=ScenesConfig(num_groups=num_groups), image_size=IMAGE_SIZE, split_fractions=(1.0, 0.0, 0.0)
    )
    pairs = obtain(Ingest(config), Context(folder, None))
    maps = {
        name: obtain(Annotate(AnnotateConfig(condition=name), pairs), Context(folder, AnnotateResources()))
        for name in CONDITIONS
    }
    encode = EncodeConfig(base=base)
    return TrainInputs(
        pairs=pairs,
        maps=maps,
        latents={
            name: obtain(Encode(encode, images), Context(folder, EncodeResources()))
            for name, images in {"image": pairs, **maps}.items()
        },
        text=obtain(EncodeText(encode, pairs), Context(folder, EncodeResources())),
    )


class PublishedStep:
    """The published step: everything online, gradient checkpointing, float32."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        controlnet: PromptDiffusionControlNet,
        data: Mapping[str, TrainingData],
    ) -> None:
        self.config, self.base, self.controlnet, self.data = config, base, controlnet, data
        self.scheduler = DDPMScheduler.from_config(base.scheduler.config)
        self.device = next(base.unet.parameters()).device

    def compute_losses(self, indices: range) -> Tensor:
        """Return the loss of each sample, of the same draws as ours."""
        draws = [draw_sample(self.config, self.data, index) for index in indices]
        samples = [draw.data.rows.assemble(draw.vision_task, draw.row, draw.example_row) for draw in draws]
        steps = torch.tensor([draw_timestep(draw.generator, self.config.noise, 1000) for draw in draws])
        steps = steps.to(self.device)

        def to_device(images: list[Any]) -> Tensor:
            return to_model_range(np.stack(images)).to(self.device)

        with torch.no_grad():
            posterior = self.base.vae.encode(to_device([sample.target for sample in samples])).latent_dist
            clean = posterior.mean + posterior.std * torch.stack(
                [sample_noise(draw.generator, posterior.mean.shape[1:]) for draw in draws]
            ).to(self.device)
            clean = clean * self.base.vae.config["scaling_factor"]
            text = self.base.encode_text(
                [sample.prompt if draw.has_text else "" for draw, sample in zip(draws, samples, strict=True)]
            )
        noise = torch.stack([sample_noise(draw.generator, clean.shape[1:]) for draw in draws]).to(self.device)
        pairs = torch.cat(
            [to_device([s.example_source for s in samples]), to_device([s.example_target for s in samples])], 1
        )
        kept = torch.tensor([draw.has_example for draw in draws], device=self.device)[:, None, None, None]
        features = self.controlnet.compute_condition_features(pairs * kept, to_device([s.query for s in samples]))
        noisy = self.scheduler.add_noise(clean, noise, steps)
        prediction = predict_noise(self.base.unet, self.controlnet, noisy, steps, text, features)
        return (prediction - noise).square().flatten(1).mean(dim=1)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        synchronise()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


class Contest:
    """Both steps on one model, with optimizers of their own."""

    def __init__(self, config: TrainConfig, divisor: int, batch_size: int, device: torch.device, folder: Path) -> None:
        self.batch_size = batch_size
        base = build_base(divisor, ["a red cube on a green floor under a clear sky"])
        base.save(folder / "base")
        inputs = make_inputs(2 * batch_size, str(folder / "base"), str(folder))
        data = open_training_data(config, inputs, ShardCache(folder / "cache"), "train")
        controlnet = build_controlnet(config, base)
        published_base, published_controlnet = copy.deepcopy(base), copy.deepcopy(controlnet)
        for part in (published_base.unet, published_base.vae, published_base.text_encoder, published_controlnet):
            part.to(device)
        place_networks(base, controlnet, device, TrainResources())
        self.objective = InContextObjective(config, base, controlnet, data, device)
        self.published = PublishedStep(config, published_base, published_controlnet, data)
        published_controlnet.trunk.enable_gradient_checkpointing()
        published_base.unet.enable_gradient_checkpointing()
        published_base.unet.train()
        self.parameters = {
            "ours": select_parameters(config, base, controlnet),
            "peer": select_parameters(config, published_base, published_controlnet),
        }
        self.optimizers: dict[str, list[Optimizer]] = {
            "ours": build_optimizers(self.parameters["ours"], config.optimizer),
            "peer": [AdamW(self.parameters["peer"].values(), lr=config.optimizer.learning_rate)],
        }
        self.position = dict.fromkeys(self.parameters, 0)

    def compute_losses(self, name: str, indices: range) -> Tensor:
        """Return the loss of each sample by one of the two paths."""
        if name == "peer":
            return self.published.compute_losses(indices)
        return self.objective.compute_losses(self.objective.prepare(indices))[0]

    @torch.no_grad()
    def find_largest_difference(self) -> float:
        """Return how far the two losses of one sample are apart at most."""
        first = range(self.batch_size)
        ours, peer = (self.compute_losses(name, first).float() for name in ("ours", "peer"))
        return float((ours - peer).abs().max())

    def step(self, name: str) -> None:
        """Take one step."""
        indices = range(self.position[name], self.position[name] + self.batch_size)
        self.position[name] += self.batch_size
        self.compute_losses(name, indices).mean().backward()
        for optimizer in self.optimizers[name]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Measure and print."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--divisor", type=int, default=1 if has_gpu else 5, help="how much narrower than SD v1.5")
    parser.add_argument("--batch-size", type=int, default=64 if has_gpu else 8)
    parser.add_argument("--rounds", type=int, default=8 if has_gpu else 5)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16" if has_gpu else "float32")
    add_out_option(parser)
    arguments = parser.parse_args()
    device = torch.device("cuda" if has_gpu else "cpu")
    config = TrainConfig(
        image_to_map_examples={"other_group": 1.0},
        map_to_image_examples={"other_group": 1.0},
        stem_channels=tuple(max(4, width // arguments.divisor) for width in (16, 32, 96, 256)),
        precision=arguments.precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(config, arguments.divisor, arguments.batch_size, device, Path(folder))
        gap = contest.find_largest_difference()
        with FlopCounterMode(display=False) as counter:
            contest.step("ours")
        operations = counter.get_total_flops() / arguments.batch_size
        paths = {"ours": lambda: contest.step("ours"), "peer": lambda: contest.step("peer")}
        compared = compare(take_turns(arguments.rounds, paths), arguments.batch_size)
    ceiling = measure_ceiling(device, torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32)
    finish(
        {
            "name": "train_step",
            **compared,
            "unit": f"samples/s, SD v1.5 at 1/{arguments.divisor} of its width, batch {arguments.batch_size}, "
            f"ours in {arguments.precision}",
            "device": describe_device(),
            "versions": find_versions("torch", "diffusers", "transformers"),
            "largest_loss_difference": gap,
            "gigaflop_a_sample": round(operations / 1e9, 2),
            "teraflops_ours": round(compared["ours"] * operations / 1e12, 4),
            "teraflops_matrix_product": round(ceiling / 1e12, 4),
            "share_of_ceiling": round(compared["ours"] * operations / ceiling, 3),
            "parameters_trained": sum(parameter.numel() for parameter in contest.parameters["ours"].values()),
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
