"""An imported checkpoint computes what the original networks compute from the same weights."""

import psutil
import pytest
import torch
from original_checkpoint import TINY, build_networks, draw_inputs, draw_weights, fill

from prompt_diffusion.model.controlnet import predict_noise
from prompt_diffusion.model.original.convert import account_for, convert_networks
from prompt_diffusion.model.original.infer import infer_layout

REAL_BYTES = 12e9


def import_in_memory(weights, num_heads):
    layout = infer_layout({name: tuple(value.shape) for name, value in weights.items()}, num_heads, 2)
    kept, averages = account_for(weights, layout, "it")
    assert not averages
    return convert_networks(kept, layout, 256, 0.18215, "it")


def assert_agree(ours, theirs, tolerance=1e-5):
    """Both the whole and the worst single value, relative to the size of what is compared."""
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 1e-3  # what is all zero would agree with anything
    difference = (ours - theirs).double()
    assert difference.norm() <= tolerance * theirs.double().norm()
    assert difference.abs().max() <= tolerance * theirs.abs().max()


def compare_networks(original, imported, x):
    """Every output of the ControlNet, and the UNet's prediction with them added."""
    control = original["control"](x["latents"], x["timesteps"], x["pair"], x["query"], x["text"])
    features = imported["controlnet"].compute_condition_features(x["pair"], x["query"])
    down, middle = imported["controlnet"](x["latents"], x["timesteps"], x["text"], features)
    assert len([*down, middle]) == len(control)
    for ours, theirs in zip([*down, middle], control, strict=True):
        assert_agree(ours, theirs)
    noise_pred = original["unet"](x["latents"], x["timesteps"], x["text"], control)
    ours = predict_noise(imported["unet"], imported["controlnet"], x["latents"], x["timesteps"], x["text"], features)
    assert_agree(ours, noise_pred)
    return len(control)


@pytest.fixture(scope="module")
def tiny():
    networks = build_networks()
    weights = draw_weights(networks)
    return fill(networks, weights), import_in_memory(weights, TINY["heads"])


@torch.no_grad()
def test_a_tiny_checkpoint_predicts_the_same_noise_as_the_original_networks(tiny):
    original, imported = tiny
    assert compare_networks(original, imported, draw_inputs(8, 32, 24)) == 5


@torch.no_grad()
def test_three_levels_two_blocks_and_the_middle_level_without_transformers_agree_too():
    options = {
        "width": 32,
        "mults": (1, 4, 2),
        "blocks": 2,
        "attention": (True, False, True),
        "context": 32,
        "heads": 8,
    }
    networks = build_networks(options)
    weights = draw_weights(networks, seed=3)
    original, imported = fill(networks, weights), import_in_memory(weights, 8)
    assert compare_networks(original, imported, draw_inputs(8, 32, 24)) == 10


@torch.no_grad()
def test_the_pair_is_read_as_source_then_target_and_not_the_other_way_round(tiny):
    original, imported = tiny
    x = draw_inputs(8, 32, 24)
    swapped = torch.cat([x["pair"][:, 3:], x["pair"][:, :3]], dim=1)
    features = imported["controlnet"].compute_condition_features(swapped, x["query"])
    down, _ = imported["controlnet"](x["latents"], x["timesteps"], x["text"], features)
    theirs = original["control"](x["latents"], x["timesteps"], x["pair"], x["query"], x["text"])
    assert (down[0] - theirs[0]).norm() > 0.02 * theirs[0].norm()


@torch.no_grad()
def test_the_autoencoder_and_the_text_encoder_agree(tiny):
    original, imported = tiny
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    moments = original["vae"].encode(images)
    assert_agree(imported["vae"].encode(images).latent_dist.parameters, moments.clamp(-30, 30))
    latents = moments[:, :4]
    assert_agree(imported["vae"].decode(latents).sample, original["vae"].decode(latents))
    tokens = torch.arange(24)[None]
    places = {"position_ids": tokens}  # networks without memory have none of their own
    ours = imported["text_encoder"](tokens, **places).last_hidden_state
    assert_agree(ours, original["text"](tokens, **places).last_hidden_state)


@torch.no_grad()
def test_a_checkpoint_of_the_released_size_predicts_the_same_noise_as_the_original_networks():
    available = psutil.virtual_memory().available
    if available < REAL_BYTES:
        pytest.skip(f"networks of SD v1.5's size need {REAL_BYTES / 1e9:.0f} GB free; {available / 1e9:.0f} GB are")
    text = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 24}
    networks = build_networks(unet={}, text=text)
    weights = draw_weights(networks)
    original, imported = fill(networks, weights), import_in_memory(weights, 8)
    assert sum(value.numel() for value in original["unet"].state_dict().values()) == 859_520_964
    assert sum(value.numel() for value in original["control"].state_dict().values()) == 362_366_032
    assert compare_networks(original, imported, draw_inputs(16, 768, 77)) == 13
