"""Validations of a run: when they are due, of which weights, and which was the best."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prompt_diffusion.engine.checkpoint import Progress
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.objective import LoopPlan, OnStep, Validate


class Validator:
    """Calls for a validation loss where it is due, and remembers it."""

    def __init__(
        self,
        validate: Validate | None,
        progress: Progress,
        plan: LoopPlan,
        resources: TrainResources,
        on_step: OnStep | None,
    ) -> None:
        self.validate, self.progress, self.num_steps, self.on_step = validate, progress, plan.num_steps, on_step
        self.every = resources.validate_every_steps

    def run_if_due(self, parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> bool:
        """Validate unless this step has no validation or has had it; whether its loss is the best so far."""
        progress, done = self.progress, {record["step"]: record["loss"] for record in self.progress.validations}
        step = progress.step
        if self.validate is None or self.every is None or step == 0 or step in done:
            return False
        if step % self.every and step < self.num_steps:
            return False
        with _exchanged(parameters, averages):
            loss = self.validate(step)
        is_best = math.isfinite(loss) and all(loss < earlier for earlier in done.values() if math.isfinite(earlier))
        progress.validations.append({"step": step, "loss": loss})
        if self.on_step is not None:
            self.on_step({"step": step, "num_steps": self.num_steps, "validation_loss": loss, "is_best": is_best})
        return is_best


@contextmanager
def _exchanged(parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Have the averages, where there are any, and the weights change places for as long as the block lasts."""
    _exchange(parameters, averages)
    try:
        yield
    finally:
        _exchange(parameters, averages)


@torch.no_grad()
def _exchange(parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    for name, average in averages.items():
        weight = parameters[name].clone()
        parameters[name].copy_(average)
        average.copy_(weight)
