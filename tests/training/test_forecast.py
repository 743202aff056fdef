"""What a training would take agrees with what is known of it and with what it takes."""

import pytest
import torch

from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.optimizer import build_optimizers
from prompt_diffusion.model.base import load_base
from prompt_diffusion.presets import demo, paper
from prompt_diffusion.training.forecast import forecast_training, read_layout
from prompt_diffusion.training.train import build_controlnet, select_parameters


@pytest.fixture(scope="module")
def of_paper():
    return forecast_training(paper().train, TrainResources(num_processes=8, device_batch_size=32), 256)


def test_the_papers_step_takes_618_gigaflop_a_sample(of_paper):
    assert of_paper.gigaflop_per_sample == pytest.approx(618, rel=0.02)


def test_the_papers_base_is_stable_diffusion_without_its_weights(of_paper):
    # the UNet's 859.5 M and the text encoder's 123.1 M, as published; ControlNet's 361.3 M with one stem
    assert of_paper.trained_parameters + of_paper.frozen_parameters == pytest.approx(
        859.5e6 + 123.1e6 + 362.4e6, rel=1e-3
    )
    assert of_paper.num_samples == 5000 * 512


def test_time_follows_from_arithmetic(of_paper):
    seconds = of_paper.predict_seconds(300.0, num_processes=8)
    assert seconds == pytest.approx(2_560_000 * of_paper.gigaflop_per_sample / 2_400_000)
    assert of_paper.predict_seconds(150.0, num_processes=16) == seconds


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_gradients_and_optimizer_state_are_those_of_a_real_step(name):
    config = demo().train.model_copy(update={"optimizer": OptimizerConfig(name=name, ema_decay=0.99)})
    forecast = forecast_training(config, TrainResources(), 64)
    base = load_base(config.base)
    parameters = select_parameters(config, base, build_controlnet(config, base))
    optimizers = build_optimizers(parameters, config.optimizer)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    weights = sum(p.nbytes for p in parameters.values())
    state = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    )
    assert forecast.trained_parameters * 4 == forecast.gradients_bytes == forecast.ema_bytes == weights
    assert forecast.optimizer_bytes == state
    assert forecast.checkpoint_bytes == 2 * weights + state


def test_low_precision_halves_saved_activations_and_checkpointing_computes_more():
    config, resources = demo().train, demo().resources.train
    plain = forecast_training(config, resources, 64)
    low = forecast_training(config.model_copy(update={"precision": "bfloat16"}), resources, 64)
    again = forecast_training(config, resources.model_copy(update={"gradient_checkpointing": True}), 64)
    assert low.activations_bytes_per_sample < 0.6 * plain.activations_bytes_per_sample
    assert low.autocast_bytes > 0
    assert 1.1 < again.gigaflop_per_sample / plain.gigaflop_per_sample < 1.5


def test_a_base_that_is_not_here_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be forecast: .*unet/config\.json is not on this machine"):
        read_layout(str(tmp_path))
