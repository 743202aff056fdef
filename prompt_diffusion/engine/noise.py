"""Timesteps, noise and loss weights of a diffusion training."""

import numpy as np
import torch
from torch import Tensor

from prompt_diffusion.engine.config import NoiseConfig


def draw_timestep(generator: np.random.Generator, noise: NoiseConfig, num_timesteps: int) -> int:
    """Draw a timestep uniformly, or for the recipe's share from the noisiest ones alone."""
    is_late = generator.random() < noise.late_fraction
    first = num_timesteps - noise.late_timesteps if is_late else 0
    return int(generator.integers(first, num_timesteps))


def sample_noise(generator: np.random.Generator, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Draw standard Gaussian noise of a shape in float32, on the CPU: the same whatever the training runs on."""
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def compute_min_snr_weights(alphas_cumprod: Tensor, steps: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return each sample's loss weight of the min-SNR-gamma strategy (Hang et al., arXiv 2303.09556).

    ``alphas_cumprod``: the schedule, T; ``steps``: N. With SNR = a / (1 - a): min(SNR, gamma) / SNR for noise prediction, and
    (min(SNR, gamma) + 1) / (SNR + 1) for v. The paper's min(SNR, gamma) / (SNR + 1) for v falls to 0 with the SNR: with a
    schedule of zero terminal SNR the last timestep, which sampling begins with, would never be trained. Ours weighs all
    timesteps of an SNR up to gamma alike, and cleaner ones like the paper in the limit.
    """
    signal = alphas_cumprod[steps]
    snr = signal / (1.0 - signal)
    capped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return (capped + 1.0) / (snr + 1.0)
    # Without any signal both capped and snr are zero: the limit of their ratio is 1.
    return torch.where(snr > 0, capped / snr, 1.0)
