"""What a run is given: the objective, how long to train, and how to validate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from prompt_diffusion.engine.config import OptimizerConfig

BatchT = TypeVar("BatchT")
"""An objective's own type of micro-batch."""

Validate = Callable[[int], float]
"""Computes the validation loss at a step."""


class Objective(Protocol[BatchT]):
    """What is minimised."""

    @property
    def labels(self) -> Sequence[str]:
        """The names under which losses are reported (the vision tasks)."""

    def prepare(self, indices: range) -> BatchT:
        """Return the micro-batch of these sample indices, on the CPU; called ahead of time, from several threads."""

    def compute_losses(self, batch: BatchT) -> tuple[Tensor, list[int]]:
        """Return the loss of each sample (a vector) and the position of its label in ``labels``."""


@dataclass(frozen=True)
class LoopPlan:
    """How long to train, the batch size, the optimizer, and where checkpoints are kept."""

    num_steps: int
    batch_size: int
    """Samples a step, over all processes and micro-batches."""
    optimizer: OptimizerConfig
    checkpoints: str
    """URI of the checkpoint folder."""
    check_owner: Callable[[], None] | None = None
    """Raises where another run has taken the folder over; called before anything is written or deleted there."""
