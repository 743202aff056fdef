"""Claim: a step of our pipeline is no slower than one of diffusers' own ControlNet pipeline, on the same networks and machine.

Both denoise one image with guidance, from the same noise, by DDIM, on one UNet and one ControlNet's weights, and their latents
are compared: the same arithmetic, but ours runs its stems once an image, the example pair's too, and the peer's runs its one
every step. On a CPU the networks have SD v1.5's layout at a fifth of its width, on a GPU its real size; weights are random.

Also reported: images a second of DDIM with 100 steps against DPM-Solver++ and UniPC with 20, and how far their outputs are
apart. That needs a model that has learned something. ``--model`` names one, such as the demo's; without it the demo's base
paints scenes by their captions alone, for a new ControlNet says nothing. The last line is one JSON object.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measuring import add_out_option, compare, describe_device, find_versions, finish, synchronise, take_turns
from _networks import IMAGE_SIZE, build_base
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.dataset import InContextData, Sample
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.vision_tasks import find_vision_task

PROMPT = "a red cube on a green floor under a clear sky"
SCHEDULERS: tuple[tuple[type[SchedulerMixin], int], ...] = (
    (DDIMScheduler, 100),
    (DDIMScheduler, 20),
    (DPMSolverMultistepScheduler, 20),
    (UniPCMultistepScheduler, 20),
    (DPMSolverMultistepScheduler, 10),
    (UniPCMultistepScheduler, 10),
)


class Contest:
    """Our pipeline and diffusers' own on the same networks."""

    def __init__(self, divisor: int, num_steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_steps = num_steps
        base = build_base(divisor, [PROMPT])
        channels = tuple(max(4, width // divisor) for width in (16, 32, 96, 256))
        theirs = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=channels)
        for parameter in theirs.parameters():
            if not parameter.any():  # a zero convolution: without weights the ControlNet would change nothing
                torch.nn.init.normal_(parameter, std=0.02)
        ours = PromptDiffusionControlNet.from_controlnet(theirs)  # its example stem is run, and silent
        self.ours = PromptDiffusionPipeline.from_parts(base, ours.eval()).to(device, dtype)
        self.peer = StableDiffusionControlNetPipeline(
            base.vae,
            base.text_encoder,
            base.tokenizer,
            base.unet,
            theirs.eval(),
            base.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(device, dtype)
        for pipeline in (self.ours, self.peer):
            pipeline.set_progress_bar_config(disable=True)
        self.images = np.random.default_rng(0).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)

    def run_ours(self) -> Tensor:
        """Return the latents of our pipeline."""
        source, target, query = self.images
        return self.ours(PROMPT, (source, target), query, **self._options()).images

    def run_peer(self) -> Tensor:
        """Return the latents of diffusers' own."""
        query = torch.from_numpy(self.images[2:]).permute(0, 3, 1, 2) / 255.0
        return self.peer(PROMPT, query, **self._options()).images

    def _options(self) -> dict[str, Any]:
        return {
            "num_inference_steps": self.num_steps,
            "height": IMAGE_SIZE,
            "width": IMAGE_SIZE,
            "guidance_scale": 7.5,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
        }


def draw_samples(count: int, image_size: int, folder: str) -> list[Sample]:
    """Return scenes that the demo was not trained on, to be made from their depth maps, with examples of other scenes."""
    config = IngestConfig(
        source=ScenesConfig(num_groups=2 * count, seed=99), image_size=image_size, split_fractions=(1.0, 0.0, 0.0)
    )
    pairs = obtain(Ingest(config), Context(folder, None))
    maps = obtain(Annotate(AnnotateConfig(condition="depth"), pairs), Context(folder, AnnotateResources()))
    data = InContextData(open_manifest(pairs.uri), {"depth": open_manifest(maps.uri)}, "train")
    task = find_vision_task("depth_to_image")
    return [data.assemble(task, row, row + count) for row in range(count)]


def compare_schedulers(
    pipeline: PromptDiffusionPipeline,
    samples: list[Sample],
    guidance_scale: float,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Return images a second of each scheduler, by the clock, and its RMSE in [0, 1] from DDIM with 100 steps."""
    sources, targets, queries = (
        np.stack([getattr(sample, side) for sample in samples])
        for side in ("example_source", "example_target", "query")
    )
    config = pipeline.scheduler.config

    def make(kind: type[SchedulerMixin], steps: int, first_seed: int = 0) -> Callable[[], NDArray[np.float32]]:
        def run() -> NDArray[np.float32]:
            pipeline.scheduler = kind.from_config(config)
            return pipeline(
                [sample.prompt for sample in samples],
                (sources, targets),
                queries,
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                height=queries.shape[1],
                width=queries.shape[2],
                generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(samples))],
                output_type="np",
            ).images

        return run

    reference = make(DDIMScheduler, 100)()
    rows = []
    for kind, steps in SCHEDULERS:
        run, seconds = make(kind, steps), []
        for _ in range(rounds):
            started = clock()
            images = run()
            synchronise()
            seconds.append(clock() - started)
        rows.append(
            {
                "scheduler": kind.__name__,
                "steps": steps,
                "images_a_second": round(len(samples) / statistics.median(seconds), 3),
                "rmse_from_ddim_100": round(float(np.sqrt(np.square(images - reference).mean())), 4),
            }
        )
    other = make(DDIMScheduler, 100, first_seed=1000)()
    return {
        "images_a_batch": len(samples),
        "guidance_scale": guidance_scale,
        "rows": rows,
        "rmse_between_two_seeds": round(float(np.sqrt(np.square(other - reference).mean())), 4),
    }


def count_operations(run: Callable[[], object]) -> float:
    """Return the operations of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def open_model(model: Path | None) -> PromptDiffusionPipeline:
    """Return a saved pipeline, or the demo's base with a new ControlNet."""
    if model is not None:
        return load_pipeline(model)
    base = load_base("demo-base")
    pipeline = PromptDiffusionPipeline.from_parts(
        base, PromptDiffusionControlNet.from_unet(base.unet, (16, 32, 64)).eval(), default_guidance_scale=2.5
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Measure and print."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--divisor", type=int, default=1 if has_gpu else 5, help="how much narrower than SD v1.5")
    parser.add_argument("--steps", type=int, default=50 if has_gpu else 5, help="denoising steps of the comparison")
    parser.add_argument("--rounds", type=int, default=10 if has_gpu else 25)
    parser.add_argument("--model", type=Path, help="folder of a trained pipeline, for the schedulers")
    parser.add_argument("--guidance-scale", type=float, help="of the schedulers; without it the model's own")
    parser.add_argument("--samples", type=int, default=8, help="images of the schedulers' comparison")
    add_out_option(parser)
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.float16) if has_gpu else ("cpu", torch.float32)
    contest = Contest(arguments.divisor, arguments.steps, torch.device(device), dtype)
    gap = float((contest.run_ours() - contest.run_peer()).abs().max())
    paths: dict[str, Callable[[], object]] = {"ours": contest.run_ours, "peer": contest.run_peer}
    operations = {name: count_operations(run) / arguments.steps for name, run in paths.items()}
    # on a CPU that others use, too, the process's own time
    clock = time.perf_counter if has_gpu else time.process_time
    seconds = {
        name: [each / arguments.steps for each in times]
        for name, times in take_turns(arguments.rounds, paths, clock).items()
    }
    pipeline = open_model(arguments.model).to(device)
    with tempfile.TemporaryDirectory() as folder:
        samples = draw_samples(arguments.samples, pipeline.image_size, folder)
    guidance_scale = arguments.guidance_scale or pipeline.default_guidance_scale
    schedulers = compare_schedulers(pipeline, samples, guidance_scale, 3, clock)
    finish(
        {
            "name": "generate",
            **compare(seconds),
            # other work on the machine slows single rounds: the fastest of each are nearly free of it
            "ratio_of_the_fastest_rounds": round(min(seconds["peer"]) / min(seconds["ours"]), 2),
            "gigaflop_a_step": {name: round(count / 1e9, 2) for name, count in operations.items()},
            "unit": f"{'' if has_gpu else 'CPU '}seconds a guided step of one {IMAGE_SIZE} px image, SD v1.5 at "
            f"1/{arguments.divisor} of its width, {str(dtype).removeprefix('torch.')}",
            "device": describe_device(),
            "versions": find_versions("torch", "diffusers", "transformers"),
            "largest_latent_difference": gap,
            "model_of_the_schedulers": "a trained model" if arguments.model else "the demo's base, by caption alone",
            "schedulers": schedulers,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
