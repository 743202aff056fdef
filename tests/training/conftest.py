"""A training small enough to run whole in a second: real stages, real diffusers modules, 32 pixels."""

import pytest

from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.config import DropoutConfig, SamplingConfig, TrainConfig
from prompt_diffusion.training.encode import (
    Encode,
    EncodeConfig,
    EncodeResources,
    EncodeText,
)
from prompt_diffusion.training.inputs import TrainInputs


@pytest.fixture(scope="session")
def train_inputs(scene_inputs, tiny_base):
    encode = EncodeConfig(base=tiny_base)
    images = {"image": scene_inputs.pairs, **scene_inputs.maps}
    latents = {
        name: obtain(Encode(encode, ref), Context(scene_inputs.store, EncodeResources()))
        for name, ref in images.items()
    }
    text = obtain(EncodeText(encode, scene_inputs.pairs), Context(scene_inputs.store, EncodeResources()))
    return TrainInputs(pairs=scene_inputs.pairs, maps=scene_inputs.maps, latents=latents, text=text)


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
