"""Checkpoints that are written beside the training: a copy of the state is taken at once, a thread brings it to the store."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from prompt_diffusion.engine.checkpoint import (
    AVERAGES_FILE,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    Progress,
    drop_checkpoints,
    flatten_optimizers,
    write_checkpoint,
)
from prompt_diffusion.engine.config import TrainResources

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run below ``folder`` (a URI), one at a time, and drops those that are not kept.

    ``check_owner`` raises where another run has taken the folder over: then nothing is written or dropped any more.
    An error of the writing thread is raised by the next ``save`` or ``wait``; where another exception ends the block, it is
    logged. The block is left when nothing is under way any more.
    """

    def __init__(
        self,
        folder: str,
        num_steps: int,
        resources: TrainResources,
        check_owner: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.num_steps, self.resources = folder, num_steps, resources
        self._check_owner = check_owner
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
            logger.exception("the last checkpoint could not be written")
        finally:
            self._pool.shutdown()

    @property
    def is_due(self) -> bool:
        """Whether the time between checkpoints has passed; a slow store makes it longer, it does not stop the training."""
        is_idle = self._under_way is None or self._under_way.done()
        return is_idle and time.monotonic() - self._saved >= self.resources.checkpoint_every_seconds

    def save(
        self,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        progress: Progress,
        averages: Mapping[str, Tensor],
    ) -> None:
        """Copy the state to the CPU and return; the copy is written meanwhile."""
        self.wait()
        contents = {
            WEIGHTS_FILE: parameters,
            OPTIMIZER_FILE: flatten_optimizers(optimizers),
            AVERAGES_FILE: averages,
        }
        for file, tensors in contents.items():
            _copy(tensors, self._copies.setdefault(file, {}))
        lists = {"history": list(progress.history), "validations": list(progress.validations)}
        self._under_way = self._pool.submit(self._write, vars(progress) | lists)
        self._saved = time.monotonic()

    def wait(self) -> None:
        """Return when no checkpoint is under way; an error of the writer is raised here."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, state: Mapping[str, Any]) -> None:
        if self._check_owner is not None:
            self._check_owner()
        write_checkpoint(self.folder, self._copies, state)
        if self._check_owner is not None:
            self._check_owner()
        drop_checkpoints(self.folder, state, self.num_steps, self.resources.spaced_checkpoints)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> None:
    """Copy tensors over those of the last time, contiguous on the CPU; from a GPU into pinned memory, at the bus's speed."""
    for name, tensor in tensors.items():
        if name not in copies:
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
