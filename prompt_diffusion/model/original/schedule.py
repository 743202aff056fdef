"""The noise schedule of a checkpoint: read from its buffers, and computed again when one is written."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor

from prompt_diffusion.model.original.layout import NUM_TIMESTEPS

PUBLISHED_BETAS = (0.00085, 0.0120)
_KINDS = ("scaled_linear", "linear")
_AGREEMENT = 1e-4  # buffers are float32, or float16 in a copy of half precision
_HALF_AGREEMENT = 4e-3


def read_scheduler(buffers: Mapping[str, Tensor]) -> DDIMScheduler:
    """Return the scheduler that samples as the original code does; the published schedule where a checkpoint states none.

    ValueError where ``betas`` follow no known schedule, or ``alphas_cumprod`` do not follow from them.
    """
    betas = buffers.get("betas")
    kind, start, end, num = "scaled_linear", *PUBLISHED_BETAS, NUM_TIMESTEPS
    tolerance = _AGREEMENT
    if betas is not None:
        tolerance = _AGREEMENT if betas.dtype == torch.float32 else _HALF_AGREEMENT
        values = betas.double().numpy()
        found = [k for k in _KINDS if np.allclose(_betas(k, values[0], values[-1], len(values)), values, tolerance, 0)]
        if not found:
            raise ValueError("its betas follow no known noise schedule (scaled_linear or linear)")
        # a float32's shortest decimal says the number that was meant
        kind, num = found[0], len(values)
        start, end = (float(f"{value:.6g}") for value in (values[0], values[-1]))
    cumulated = buffers.get("alphas_cumprod")
    if cumulated is not None:
        expected = np.cumprod(1 - _betas(kind, start, end, num))
        values = cumulated.double().numpy()
        if values.shape != expected.shape or not np.allclose(values, expected, max(tolerance, 1e-3), 1e-4):
            raise ValueError("its alphas_cumprod do not follow from its betas")
    return build_scheduler(kind, start, end, num)


def build_scheduler(kind: str, start: float, end: float, num: int, prediction_type: str = "epsilon") -> DDIMScheduler:
    """Return a DDIM scheduler of that noise schedule which visits the original sampler's timesteps."""
    return DDIMScheduler(
        num_train_timesteps=num,
        beta_start=start,
        beta_end=end,
        beta_schedule=kind,
        prediction_type=prediction_type,
        clip_sample=False,
        # the original sampler visits timesteps 1, 1 + 1000 / n, ... and ends at the first alpha, not at 1
        set_alpha_to_one=False,
        steps_offset=1,
    )


def compute_buffers(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the original code keeps beside the weights, in its names, so that its own strict loading accepts a file.

    Source: ``register_schedule`` of latent diffusion, DDPM (arXiv 2006.11239, equations 4 and 7); float64, kept as float32.
    """
    num = int(scheduler["num_train_timesteps"])
    kind = scheduler["beta_schedule"]
    if kind not in _KINDS:
        raise ValueError(f"the original layout cannot express beta_schedule {kind!r}; it knows {' and '.join(_KINDS)}")
    betas = _betas(kind, scheduler["beta_start"], scheduler["beta_end"], num)
    alphas = 1 - betas
    cumulated = np.cumprod(alphas)
    before = np.append(1.0, cumulated[:-1])
    variance = betas * (1 - before) / (1 - cumulated)
    values = {
        "betas": betas,
        "alphas_cumprod": cumulated,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(cumulated),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulated),
        "log_one_minus_alphas_cumprod": np.log(1 - cumulated),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumulated),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumulated - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - cumulated),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - cumulated),
        "logvar": np.zeros(num),
    }
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def _betas(kind: str, start: float, end: float, num: int) -> NDArray[np.float64]:
    if kind == "linear":
        return np.linspace(start, end, num)
    return np.linspace(start**0.5, end**0.5, num) ** 2
