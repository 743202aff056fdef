"""Which of diffusers' schedulers a pipeline can sample with, and what their steps take besides the prediction."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin

_GIVEN = ("self", "model_output", "timestep", "sample")
_NEEDED = ("set_timesteps", "scale_model_input", "step", "init_noise_sigma", "order")


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError for one that is made for another kind of model: of flows, of other inputs, or for inversion alone."""
    missing = [name for name in _NEEDED if not hasattr(scheduler, name)]
    if not missing:
        parameters = inspect.signature(scheduler.step).parameters
        missing = [
            name for name, each in parameters.items() if each.default is inspect.Parameter.empty and name not in _GIVEN
        ]
    if missing:
        raise ValueError(
            f"{type(scheduler).__name__} cannot sample from a model like Stable Diffusion (it has another {missing[0]}): "
            "take one such as DDIMScheduler, UniPCMultistepScheduler or DPMSolverMultistepScheduler"
        )


def choose_step_options(
    scheduler: SchedulerMixin, eta: float, generators: Sequence[torch.Generator | None] | None
) -> dict[str, Any]:
    """Return those of DDIM's ``eta`` and the generators, one per image, that the scheduler's step takes."""
    known = inspect.signature(scheduler.step).parameters
    options = {"eta": eta, "generator": generators}
    return {name: value for name, value in options.items() if name in known}
