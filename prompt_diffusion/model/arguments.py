"""The numbers of a call, checked before anything is computed: each mistake is one sentence with the value that was given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class SamplerOptions:
    """How the steps are taken."""

    num_inference_steps: int
    eta: float
    """DDIM's share of fresh noise."""
    guidance_rescale: float
    controlnet_conditioning_scale: float
    control_guidance_start: float
    control_guidance_end: float
    """The part of the steps, from 0 to 1, in which the ControlNet takes part."""

    def weigh_controlnet(self, index: int, count: int) -> float:
        """Return the weight of the ControlNet's residuals at a step, by its index among all ``count`` timesteps."""
        is_outside = index / count < self.control_guidance_start or (index + 1) / count > self.control_guidance_end
        return 0.0 if is_outside else self.controlnet_conditioning_scale


def check_sampler_options(
    num_inference_steps: object,
    largest: int,
    eta: object,
    guidance_rescale: object,
    controlnet_conditioning_scale: object,
    control_guidance_start: object,
    control_guidance_end: object,
) -> SamplerOptions:
    """Return them as numbers; ValueError names the one that is none, not finite or out of its range."""
    start = check_number("control_guidance_start", control_guidance_start, 0.0, 1.0)
    end = check_number("control_guidance_end", control_guidance_end, 0.0, 1.0)
    if start >= end:
        raise ValueError(f"control_guidance_start must be below control_guidance_end, got {start:g} and {end:g}")
    return SamplerOptions(
        num_inference_steps=check_count("num_inference_steps", num_inference_steps, largest),
        eta=check_number("eta", eta, 0.0, 1.0),
        guidance_rescale=check_number("guidance_rescale", guidance_rescale, 0.0, 1.0),
        controlnet_conditioning_scale=check_number("controlnet_conditioning_scale", controlnet_conditioning_scale),
        control_guidance_start=start,
        control_guidance_end=end,
    )


def check_count(name: str, value: object, largest: int | None = None) -> int:
    """Return a whole number from 1 to ``largest``; ValueError for anything else, 2.0 included."""
    allowed = "at least 1" if largest is None else f"between 1 and {largest}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number {allowed}, got {_show(value)}")
    number = int(value)
    if number < 1 or (largest is not None and number > largest):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def check_number(name: str, value: object, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """Return a finite number in a range; ValueError for anything else, a list of one included."""
    allowed = "" if lowest == -math.inf else f" between {lowest:g} and {highest:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be one number{allowed}, got {_show(value)}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number{allowed}, got {number}")
    if not lowest <= number <= highest:
        raise ValueError(f"{name} must be{allowed}, got {number:g}")
    return number


def list_generators(generator: Generators, count: int) -> list[torch.Generator | None]:
    """Return one generator for each image; one alone serves all, one after the other."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if not isinstance(generator, list | tuple) or not all(isinstance(each, torch.Generator) for each in generator):
        raise ValueError(
            f"generator is a torch.Generator or a list of them, got {_show(generator)}: for a seed give "
            "torch.Generator().manual_seed(SEED)"
        )
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators were given for {count} images: give one each")
    return list(generator)


def check_callback(callback: object, names: Any, known: Sequence[str]) -> None:  # noqa: ANN401 - whatever a user gave
    """Raise ValueError for a callback that cannot be called, or that asks for tensors that there are not."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is called after each step, got {_show(callback)}")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"callback_on_step_end_tensor_inputs is a list of names, got {_show(names)}")
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {', '.join(known)}, got {', '.join(unknown)}")


def _show(value: object) -> str:
    """Return a value for a sentence: its type where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 40 and "\n" not in shown else f"a value of type {type(value).__name__}"
