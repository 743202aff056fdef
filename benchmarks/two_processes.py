"""Claim: two processes that share a step's batch train at least 1.7 times as fast as one, of the compute that is there.

The real loop trains a UNet of SD v1.5's layout at a tenth of its width (denoising, AdamW, random latents) through torchrun, one
CPU thread per process, gloo between them; the batch is the same for one and for two. In turn with them two independent
ones train at once: what they reach together is all that the machine's two cores can give. The last line is one
JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from _measuring import add_out_option, compare, describe_device, find_versions, finish
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS, join_world
from prompt_diffusion.engine.events import Event, StepEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan

WIDTHS = (32, 64, 128, 128)
TEXT_WIDTH = 80
LATENT = (4, 32, 32)
MICRO_BATCH = 8


class Denoising:
    """The noise-prediction loss on latents and text embeddings that are themselves random."""

    labels = ("denoising",)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=LATENT[1],
            block_out_channels=WIDTHS,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
        )
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def prepare(self, indices: range) -> list[Tensor]:
        """Return latents, noise, timesteps and text."""
        generators = [sample_generator(0, index) for index in indices]
        shapes = (LATENT, LATENT, (77, TEXT_WIDTH))
        drawn = [[torch.from_numpy(g.standard_normal(shape, dtype="float32")) for shape in shapes] for g in generators]
        clean, noise, text = (torch.stack(column) for column in zip(*drawn, strict=True))
        return [clean, noise, torch.tensor([int(g.integers(1000)) for g in generators]), text]

    def compute_losses(self, batch: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Return the loss of each sample."""
        clean, noise, timesteps, text = batch
        prediction = self.unet(self.scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample
        return (prediction - noise).square().flatten(1).mean(dim=1), [0] * len(clean)


def train(is_shared: bool, num_steps: int, batch_size: int) -> None:
    """Be a process of torchrun: train together, or each for itself; who reports prints its median samples/s."""
    objective, rates = Denoising(), []

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent):
            rates.append(event.samples_per_second)

    resources = TrainResources(device_batch_size=MICRO_BATCH, log_every_steps=1, checkpoint_every_seconds=1e9)
    with join_world("cpu", 1) as world, tempfile.TemporaryDirectory() as folder:
        world.barrier()
        run_loop(
            objective,
            dict(objective.unet.named_parameters()),
            LoopPlan(num_steps, batch_size, OptimizerConfig(), folder),
            resources,
            world if is_shared else SINGLE_PROCESS,
            listen,
        )
    if rates:
        sys.stdout.write(json.dumps(statistics.median(rates[1:])) + "\n")


def measure(num_processes: int, is_shared: bool, arguments: argparse.Namespace) -> float:
    """Return the samples/s of all processes of a torchrun together."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    options = [f"--steps={arguments.steps}", f"--batch-size={arguments.batch_size}"]
    command = [*torchrun, __file__, "--child", "shared" if is_shared else "apart", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return sum(float(line) for line in done.stdout.splitlines())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--child", choices=["shared", "apart"], help=argparse.SUPPRESS)
    add_out_option(parser)
    arguments = parser.parse_args()
    if arguments.child is not None:
        train(arguments.child == "shared", arguments.steps, arguments.batch_size)
        return
    paths = {"peer": (1, True), "ours": (2, True), "apart": (2, False)}
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(arguments.rounds):
        for name, (num_processes, is_shared) in paths.items():
            rates[name].append(measure(num_processes, is_shared, arguments))
    seconds = {name: [arguments.batch_size / rate for rate in values] for name, values in rates.items()}
    ceiling = compare({"ours": seconds["apart"], "peer": seconds["peer"]})["ratio"]
    share = compare({"ours": seconds["ours"], "peer": seconds["apart"]})
    torch.set_num_threads(1)
    finish(
        {
            "name": "two_processes",
            **compare(seconds, arguments.batch_size),
            "unit": f"samples/s, batch {arguments.batch_size} in micro-batches of {MICRO_BATCH}: two processes against one",
            "device": describe_device(),
            "versions": find_versions("torch", "diffusers"),
            "ratio_of_two_apart": ceiling,
            "share_of_two_apart": share["ratio"],
            "share_spread": share["spread"],
            "parameters": sum(parameter.numel() for parameter in Denoising().unet.parameters()),
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
