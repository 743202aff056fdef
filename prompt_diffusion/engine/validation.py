"""Periodic validation: with the EMA weights where the recipe keeps them, and a record of the best loss."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prompt_diffusion.engine.checkpoint import TrainState
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import OnEvent, ValidationEvent
from prompt_diffusion.engine.objective import LoopPlan, Validate


class PeriodicValidation:
    """Validates every ``validate_every_steps`` and at the last step, records the loss, and reports it."""

    def __init__(
        self,
        validate: Validate | None,
        state: TrainState,
        plan: LoopPlan,
        resources: TrainResources,
        on_event: OnEvent | None,
    ) -> None:
        self.validate, self.state, self.num_steps, self.on_event = validate, state, plan.num_steps, on_event
        self.every = resources.validate_every_steps

    def run_if_due(self, parameters: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> bool:
        """Validate, unless none is due at this step or it was done before; return whether the loss is the best so far."""
        state, done = self.state, {record["step"]: record["loss"] for record in self.state.validations}
        step = state.step
        if self.validate is None or self.every is None or step == 0 or step in done:
            return False
        if step % self.every and step < self.num_steps:
            return False
        with _ema_weights(parameters, ema):
            loss = self.validate(step)
        is_best = math.isfinite(loss) and all(loss < earlier for earlier in done.values() if math.isfinite(earlier))
        state.validations.append({"step": step, "loss": loss})
        if self.on_event is not None:
            self.on_event(ValidationEvent(step=step, num_steps=self.num_steps, loss=loss, is_best=is_best))
        return is_best


@contextmanager
def _ema_weights(parameters: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> Iterator[None]:
    """Swap the weights for their EMA, where there is one, while the block runs."""
    _swap(parameters, ema)
    try:
        yield
    finally:
        _swap(parameters, ema)


@torch.no_grad()
def _swap(parameters: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
    for name, average in ema.items():
        weight = parameters[name].clone()
        parameters[name].copy_(average)
        average.copy_(weight)
