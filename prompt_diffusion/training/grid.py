"""A grid of validation samples of each vision task, with fixed seeds: what a training has learned so far."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from prompt_diffusion.data.dataset import InContextData
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.transforms import Pixels, encode_png
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.vision_tasks import ExamplePolicy, find_vision_task

_SAMPLES, _GAP = 4, 4


def render_validation_grid(
    pipeline: PromptDiffusionPipeline, data: Mapping[str, InContextData], config: TrainConfig
) -> bytes:
    """Return a PNG with one row for each vision task: a few samples of example source and target, query, output and truth.

    ``data``: the rows that each vision task is sampled from.
    """
    rows = []
    num_samples = min(_SAMPLES, *(its.num_rows for its in data.values()))
    pipeline.set_progress_bar_config(disable=True)
    for name in config.vision_tasks:
        task, its = find_vision_task(name), data[name]
        policy: ExamplePolicy = "other_group" if len(set(its.group_ids)) > 1 else "same_row"
        samples = [
            its.assemble(task, row, its.choose_example(policy, row, sample_generator(config.seed, row)))
            for row in range(num_samples)
        ]
        sources, targets, queries = (
            np.stack([getattr(sample, field) for sample in samples])
            for field in ("example_source", "example_target", "query")
        )
        outputs: Pixels = pipeline(
            [sample.prompt for sample in samples],
            (sources, targets) if pipeline.controlnet.uses_example_pair else None,
            queries,
            guidance_scale=config.sampling.guidance_scale if task.direction == "map_to_image" else 1.0,
            num_inference_steps=config.sampling.num_inference_steps,
            height=queries.shape[1],
            width=queries.shape[2],
            generator=[torch.Generator().manual_seed(row) for row in range(len(samples))],
            output_type="uint8",
        ).images
        cells = [
            np.concatenate([s.example_source, s.example_target, s.query, output, s.target], axis=1)
            for s, output in zip(samples, outputs, strict=True)
        ]
        rows.append(_concatenate(cells, axis=1))
    grid = _concatenate(rows, axis=0)
    scale = max(1, 128 // samples[0].query.shape[0])
    large = Image.fromarray(grid).resize((grid.shape[1] * scale, grid.shape[0] * scale), Image.Resampling.NEAREST)
    return encode_png(np.asarray(large))


def _concatenate(images: list[Pixels], axis: int) -> Pixels:
    """Concatenate images with white gaps between them."""
    shape = list(images[0].shape)
    shape[axis] = _GAP
    gap = np.full(shape, 255, np.uint8)
    parts = [part for image in images for part in (image, gap)][:-1]
    return np.concatenate(parts, axis=axis)
