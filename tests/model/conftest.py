"""A pipeline of real, tiny parts whose every condition matters."""

import numpy as np
import pytest
import torch

from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline


def build_pipeline(base, example_pair=True):
    parts = load_base(base)
    torch.manual_seed(3)
    controlnet = PromptDiffusionControlNet.from_unet(parts.unet, (4, 8, 8), example_pair).eval()
    for parameter in controlnet.parameters():  # a fresh one would ignore pair and query
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = PromptDiffusionPipeline.from_parts(
        parts, controlnet, default_num_inference_steps=3, default_guidance_scale=2.0
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return build_pipeline(tiny_base)


@pytest.fixture(scope="module")
def baseline(tiny_base):
    """One without an example stem."""
    return build_pipeline(tiny_base, example_pair=False)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """The same, saved."""
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def fresh(folder):
    """A copy that a test may change."""
    return load_pipeline(folder)


@pytest.fixture(scope="session")
def draw_images():
    """Return what draws stacks of sources, targets and queries."""

    def draw(count, seed=None):
        rng = np.random.default_rng(count if seed is None else seed)
        return [rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for _ in range(3)]

    return draw


@pytest.fixture(scope="session")
def seeded():
    """Return what makes one generator an image."""
    return lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
