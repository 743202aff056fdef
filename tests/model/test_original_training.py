"""Trainings go on from what was imported: a base, and a released model with its ControlNet."""

import pytest
import torch
from original_checkpoint import HEADS, build_networks, draw_weights, save_tokenizer, schedule_buffers
from safetensors.torch import load_file, save_file

from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.model.original.convert import import_checkpoint, open_original
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import (
    Encode,
    EncodeConfig,
    EncodeResources,
    EncodeText,
)
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.stage import Train
from prompt_diffusion.training.train import run_train


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A base and a released model of the same frozen parts, as folders."""
    folder = tmp_path_factory.mktemp("imported")
    weights = draw_weights(build_networks()) | schedule_buffers()
    save_file(weights, folder / "released.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("control_model.")}
    save_file(weights, folder / "base.safetensors")
    tokenizer = save_tokenizer(folder / "tokenizer")
    for name in ("base", "released"):
        file = open_original(folder / f"{name}.safetensors", **HEADS)
        import_checkpoint(file, folder / name, tokenizer, image_size=32)
    return folder


@pytest.fixture(scope="module")
def inputs(imported, scene_inputs):
    encode = EncodeConfig(base=str(imported / "base"))
    latents = obtain(Encode(encode, scene_inputs.pairs), Context(scene_inputs.store, EncodeResources()))
    text = obtain(EncodeText(encode, scene_inputs.pairs), Context(scene_inputs.store, EncodeResources()))
    maps = {"depth": scene_inputs.maps["depth"]}
    return TrainInputs(pairs=scene_inputs.pairs, maps=maps, latents={"image": latents}, text=text)


def train(imported, inputs, store, **options):
    config = TrainConfig(
        vision_tasks=("depth_to_image",),
        map_to_image_examples={"same_row": 1.0},
        batch_size=2,
        num_steps=1,
        **options,
    )
    sealed = run_train(Train(config, inputs), str(store), TrainResources(validate_every_steps=None), World())
    return load_pipeline(open_manifest(sealed.uri).fetch_folder("pipeline", store / "fetched"))


def test_a_training_starts_from_an_imported_base(imported, inputs, tmp_path):
    trained = train(imported, inputs, tmp_path, base=str(imported / "base"))
    start = load_file(imported / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    now = trained.unet.state_dict()
    moved = {name.split(".")[0] for name, value in start.items() if not torch.equal(value, now[name])}
    assert moved
    assert moved <= {"up_blocks", "conv_norm_out", "conv_out"}
    assert trained.controlnet.config["stem_channels"] in ([16, 32, 96, 256], (16, 32, 96, 256))


def test_a_training_goes_on_from_an_imported_model(imported, inputs, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-5, weight_decay=0)
    trained = train(imported, inputs, tmp_path, base=str(imported / "released"), controlnet="base", optimizer=optimizer)
    start = load_file(imported / "released" / "controlnet" / "diffusion_pytorch_model.safetensors")
    now = trained.controlnet.state_dict()
    assert now.keys() == start.keys()
    # one step of AdamW moves a weight by the learning rate at most: these are the imported ones, a step further
    differences = {name: (now[name] - value).abs().max().item() for name, value in start.items()}
    assert max(differences.values()) < 1.1e-5
    assert differences["example_stem.conv_in.weight"] > 0
