"""A training small enough to run whole in a second: real stages, real diffusers modules, 32 pixels."""

import pytest

from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig
from prompt_diffusion.training.config import DropoutConfig, SamplingConfig, TrainConfig


@pytest.fixture(scope="session")
def tiny_config(tiny_base):
    return TrainConfig(
        base=tiny_base,
        image_to_map_examples={"other_group": 0.5, "same_group": 0.5},
        map_to_image_examples={"same_row": 1.0},
        dropout=DropoutConfig(text_image_to_map=0.5),
        noise=NoiseConfig(prediction_type="v_prediction", late_fraction=0.3),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, flat_fraction=0.5, final_factor=0.1),
        stem_channels=(4, 8, 8),
        sampling=SamplingConfig(num_inference_steps=3, guidance_scale=2.0),
        batch_size=6,
        num_steps=10,
    )
