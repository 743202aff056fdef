"""A training small enough to run whole in a second: real stages, real diffusers modules, 32 pixels."""

import pytest

from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig
from prompt_diffusion.model.base import load_base
from prompt_diffusion.training.config import DropoutConfig, SamplingConfig, TrainConfig
from prompt_diffusion.training.rows import open_training_data


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


@pytest.fixture(scope="module")
def base(tiny_base):
    """Return the tiny base, loaded."""
    return load_base(tiny_base)


@pytest.fixture(scope="module")
def data(train_inputs, tiny_config, tmp_path_factory):
    """Open the data of the tiny recipe's vision tasks."""
    return open_training_data(tiny_config, train_inputs, ShardCache(tmp_path_factory.mktemp("cache")), "train")


@pytest.fixture(scope="module")
def fixed_texts(base):
    """Encode the texts that vision tasks have of their own."""
    return {text: base.encode_text([text])[0].numpy() for text in ("", "depth map", "hed map", "segmentation map")}
