"""What the training loop is told: what to minimise, how long, and whom to tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from prompt_diffusion.engine.config import OptimizerConfig

Batch = TypeVar("Batch")

OnStep = Callable[[dict[str, Any]], None]
"""Hears of a run, one event at a time."""
Validate = Callable[[int], float]
"""Returns the validation loss at a step."""


class Objective(Protocol[Batch]):
    """What is minimised."""

    @property
    def labels(self) -> Sequence[str]:
        """What losses are reported under (the vision tasks)."""

    def prepare(self, indices: range) -> Batch:
        """Return all that the CPU can do for these samples of the stream; called in threads, ahead of time."""

    def compute_losses(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Return the loss of each sample (a vector) and its label's position in ``labels``."""


@dataclass(frozen=True)
class LoopPlan:
    """How long, how much at once, and where checkpoints live."""

    num_steps: int
    batch_size: int
    optimizer: OptimizerConfig
    checkpoints: str
    """URI of the checkpoint folder."""
    check_owner: Callable[[], None] | None = None
    """Raises where another run has taken the folder over; called before anything is written or deleted there."""
