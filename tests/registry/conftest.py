"""A registry on SQLite for the session, a sealed training of one step, and a pipeline's folder with random weights."""

import shutil

import pytest

from prompt_diffusion.engine.config import NoiseConfig, TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.registry import register_model
from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.database import make_database
from prompt_diffusion.training.config import DropoutConfig, SamplingConfig, TrainConfig
from prompt_diffusion.training.stage import Train
from prompt_diffusion.training.train import run_train


@pytest.fixture(scope="session")
def train_one_step(scene_inputs, train_inputs):
    """Return what trains a model of one step from a base, and seals it."""

    def train(base, **changes):
        config = TrainConfig(
            base=base,
            image_to_map_examples={"other_group": 1.0},
            dropout=DropoutConfig(),
            noise=NoiseConfig(prediction_type="v_prediction"),
            sampling=SamplingConfig(num_inference_steps=3, guidance_scale=2.0),
            stem_channels=(4, 8, 8),
            batch_size=2,
            num_steps=1,
            **changes,
        )
        return run_train(Train(config, train_inputs), scene_inputs.store, TrainResources(), World())

    return train


@pytest.fixture(scope="session")
def model(train_one_step, tiny_base):
    return train_one_step(tiny_base)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Return MLflow's database without anything in it: making one takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    make_database(path)
    return path


@pytest.fixture
def own(empty_database, tmp_path):
    """Return a registry of the test's own, in which it may delete what it likes."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return Settings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", cache_dir=tmp_path / "cache")


@pytest.fixture(scope="session")
def settings(tmp_path_factory, make_mlflow_database):
    folder = tmp_path_factory.mktemp("mlflow")
    return Settings(tracking_uri=make_mlflow_database(folder), cache_dir=folder / "cache")


@pytest.fixture(scope="session")
def registered(model, settings):
    return register_model(model, settings, {"rmse/image_to_depth": 0.5})


@pytest.fixture(scope="session")
def pipeline_folder(tiny_base, tmp_path_factory):
    import torch

    from prompt_diffusion.model.base import load_base
    from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

    base = load_base(tiny_base)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = PromptDiffusionPipeline.from_parts(base, PromptDiffusionControlNet.from_unet(base.unet, (4, 8, 8)))
    pipeline.save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle that nobody may open")
    return folder
