"""Asynchronous checkpoints: the state is copied to the CPU at once, and a thread writes the copy to the store."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from prompt_diffusion.engine.checkpoint import (
    EMA_FILE,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    TrainState,
    delete_checkpoints,
    flatten_optimizers,
    write_checkpoint,
)
from prompt_diffusion.engine.config import TrainResources

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run below ``folder`` (a URI), one at a time, and deletes those that are not kept.

    ``check_owner`` raises where another run has taken the folder over: then nothing is written or deleted any more.
    An error of the writing thread is raised by the next ``save`` or ``wait``; where another exception ends the block, it is
    logged. Leaving the block waits for the last checkpoint.
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
        self._pending: Future[None] | None = None
        self._host_copies: dict[str, dict[str, Tensor]] = {}
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
        """Whether the next checkpoint is due; a slow store delays it, and does not hold up the training."""
        is_idle = self._pending is None or self._pending.done()
        return is_idle and time.monotonic() - self._saved >= self.resources.checkpoint_every_seconds

    def save(
        self,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        state: TrainState,
        ema: Mapping[str, Tensor],
    ) -> None:
        """Copy the state to the CPU and return; the copy is written in the background."""
        self.wait()
        contents = {
            WEIGHTS_FILE: parameters,
            OPTIMIZER_FILE: flatten_optimizers(optimizers),
            EMA_FILE: ema,
        }
        for file, tensors in contents.items():
            _copy_to_host(tensors, self._host_copies.setdefault(file, {}))
        snapshot = replace(state, history=list(state.history), validations=list(state.validations))
        self._pending = self._pool.submit(self._write, snapshot)
        self._saved = time.monotonic()

    def wait(self) -> None:
        """Wait for the checkpoint being written; an error of the writer is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: TrainState) -> None:
        if self._check_owner is not None:
            self._check_owner()
        write_checkpoint(self.folder, self._host_copies, state)
        if self._check_owner is not None:
            self._check_owner()
        delete_checkpoints(self.folder, state, self.num_steps, self.resources.spaced_checkpoints)


@torch.no_grad()
def _copy_to_host(tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> None:
    """Copy tensors into contiguous buffers on the CPU, which are reused; from a GPU they are pinned, for a fast copy."""
    for name, tensor in tensors.items():
        if name not in copies:
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
