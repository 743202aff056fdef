import pytest
import torch
from diffusers import DDPMScheduler

from prompt_diffusion.engine.noise import compute_min_snr_weights
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.train import build_scheduler


def test_min_snr_weights_by_hand():
    alphas = torch.tensor([0.9, 0.5, 0.0])  # signal-to-noise ratios 9, 1, 0
    steps = torch.tensor([0, 1, 2])
    torch.testing.assert_close(compute_min_snr_weights(alphas, steps, 5.0, "epsilon"), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(
        compute_min_snr_weights(alphas, steps, 5.0, "v_prediction"), torch.tensor([0.6, 1.0, 1.0])
    )


def test_min_snr_trains_every_timestep_of_a_schedule_with_zero_terminal_snr():
    scheduler = DDPMScheduler.from_config(build_scheduler(PretrainConfig()).config)
    steps = torch.arange(scheduler.config["num_train_timesteps"])
    weights = compute_min_snr_weights(scheduler.alphas_cumprod, steps, 5.0, "v_prediction")
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert weights[-1] == pytest.approx(1.0)
    assert (weights.diff() >= -1e-6).all(), "the noisier, the heavier"
    assert weights.max() <= 1.0 + 1e-6
