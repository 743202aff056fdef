"""The training loop: any objective, one process or many, resumable at every checkpoint.

Letters: a *step* is one update of the weights from ``batch_size`` samples; a step's batch is shared among the processes and
taken in micro-batches of ``device_batch_size``. The loss of a step is the mean over its whole batch.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prompt_diffusion.data.sampler import split_batch
from prompt_diffusion.training.checkpoint import Progress, restore_checkpoint, save_checkpoint
from prompt_diffusion.training.config import OptimizerConfig, TrainResources
from prompt_diffusion.training.optimizer import build_optimizers, learning_rate_factor, set_learning_rates
from prompt_diffusion.training.world import World

logger = logging.getLogger(__name__)

_MAX_SKIPS_IN_A_ROW = 5


class Objective(Protocol):
    """What is minimised."""

    @property
    def labels(self) -> Sequence[str]:
        """What losses are reported under (the vision tasks)."""

    def compute_losses(self, indices: range) -> tuple[Tensor, list[int]]:
        """Return the loss of each sample of the stream (a vector) and its label's position in ``labels``."""


@dataclass(frozen=True)
class LoopPlan:
    """How long, how much at once, and where checkpoints live."""

    num_steps: int
    batch_size: int
    optimizer: OptimizerConfig
    checkpoints: str
    """URI of the checkpoint folder."""


class Stopped(Exception):  # noqa: N818 - it is no error: the run was asked to stop and saved itself
    """The run was asked to stop (SIGTERM or Ctrl-C) and has saved a checkpoint."""


OnStep = Callable[[dict[str, Any]], None]


def run_loop(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    plan: LoopPlan,
    resources: TrainResources,
    world: World,
    on_step: OnStep | None = None,
) -> Progress:
    """Train from the newest checkpoint to the last step; the parameters are changed in place.

    ``on_step`` gets, on the main process every ``log_every_steps``: step, num_steps, loss, losses by label, gradient_norm,
    learning_rate_factor, num_skipped, samples_per_second, eta_seconds. Raises ``Stopped`` after SIGTERM or SIGINT, with a
    checkpoint saved. A step whose loss or gradient is not finite, or too large for the recipe, changes nothing and is
    counted; after five in a row FloatingPointError, with the last good checkpoint left. Where a device's memory does not
    suffice, micro-batches are halved; MemoryError where one sample is too much.
    """
    if plan.batch_size % world.size:
        raise ValueError(f"a batch of {plan.batch_size} samples does not divide among {world.size} processes")
    optimizers = build_optimizers(parameters, plan.optimizer, world)
    decay = plan.optimizer.ema_decay
    averages = {} if decay is None else {name: p.detach().clone() for name, p in parameters.items()}
    progress = restore_checkpoint(plan.checkpoints, parameters, optimizers, averages)
    meter, micro = Meter(progress, plan, resources), MicroBatch(resources.device_batch_size)
    with _catch_signals(world.stop_requested) as stop_requested:
        while progress.step < plan.num_steps:
            set_learning_rates(optimizers, learning_rate_factor(progress.step, plan.num_steps, plan.optimizer))
            sums = _accumulate(objective, parameters, plan, micro, world, progress.step)
            # the last entry is the wish to stop: summed, so that every process leaves at the same step
            sums[-1, 0] = float(stop_requested.is_set())
            world.sum_in_place(sums)
            norm = _clip(parameters, plan.optimizer.clip_norm)
            progress.step += 1
            if _is_sound(sums, norm, plan.optimizer.skip_norm):
                progress.skipped_in_a_row = 0
                for optimizer in optimizers:
                    optimizer.step()
                if decay is not None:
                    _move_averages(averages, parameters, decay)
            else:
                _count_skip(progress, norm)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            meter.record(objective.labels, sums, norm, on_step if world.is_main else None)
            is_last, wants_to_stop = progress.step == plan.num_steps, bool(sums[-1, 0] > 0)
            if world.is_main and (is_last or wants_to_stop or meter.checkpoint_is_due()):
                save_checkpoint(plan.checkpoints, parameters, optimizers, progress, averages)
                meter.checkpoint_done()
            if wants_to_stop and not is_last:
                raise Stopped(f"stopped at step {progress.step} of {plan.num_steps}; run the same command to go on")
    if averages:
        _move_averages(parameters, averages, 0.0)
    return progress


@torch.no_grad()
def _move_averages(averages: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """Move each average towards its parameter; with decay 0, onto it."""
    torch._foreach_lerp_(list(averages.values()), list(parameters.values()), 1.0 - decay)


@dataclass
class MicroBatch:
    """How many samples a device takes at once: as asked, or as many as its memory bears."""

    size: int


def _is_sound(sums: Tensor, norm: float, skip_norm: float | None) -> bool:
    """Say whether a step may be taken: the same on every process, for sums and gradients are."""
    return bool(torch.isfinite(sums).all()) and math.isfinite(norm) and (skip_norm is None or norm <= skip_norm)


def _count_skip(progress: Progress, norm: float) -> None:
    progress.num_skipped += 1
    progress.skipped_in_a_row += 1
    logger.warning("step %d is skipped: its loss is not finite, or its gradient's norm is %g", progress.step, norm)
    if progress.skipped_in_a_row == _MAX_SKIPS_IN_A_ROW:
        raise FloatingPointError(
            f"steps {progress.step - _MAX_SKIPS_IN_A_ROW + 1} to {progress.step} had losses or gradients that are not finite "
            "or too large: stopped; the last checkpoint is whole"
        )


def _accumulate(
    objective: Objective,
    parameters: Mapping[str, Tensor],
    plan: LoopPlan,
    micro: MicroBatch,
    world: World,
    step: int,
) -> Tensor:
    """Leave the batch's mean gradient in the parameters; return sums and counts by label, and one row to spare."""
    indices = split_batch(step, plan.batch_size, world.rank, world.size)
    while True:
        try:
            sums = _add_up(objective, indices, micro.size, plan.batch_size)
            break
        except torch.OutOfMemoryError as error:
            if micro.size == 1:
                raise MemoryError(f"one sample does not fit into the memory of {world.device}: {error}") from error
            micro.size = (min(micro.size, len(indices)) + 1) // 2
            logger.warning("out of memory: %d samples at once from here on, the batch stays as it is", micro.size)
        # Begun anew, once the error and what it held are gone.
        for parameter in parameters.values():
            parameter.grad = None
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.sum_gradients(list(parameters.values()))
    return sums


def _add_up(objective: Objective, indices: range, size: int, batch_size: int) -> Tensor:
    sums = torch.zeros(len(objective.labels) + 1, 2, dtype=torch.float64)
    for start in range(0, len(indices), size):
        losses, labels = objective.compute_losses(indices[start : start + size])
        (losses.sum() / batch_size).backward()  # type: ignore[no-untyped-call]
        for loss, label in zip(losses.tolist(), labels, strict=True):
            sums[label] += torch.tensor([loss, 1.0], dtype=torch.float64)
    return sums


def _clip(parameters: Mapping[str, Tensor], clip_norm: float | None) -> float:
    limit = float("inf") if clip_norm is None else clip_norm
    return float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit))


class Meter:
    """Keeps the history, the clock and the checkpoint timer of a run."""

    def __init__(self, progress: Progress, plan: LoopPlan, resources: TrainResources) -> None:
        self.progress, self.plan, self.resources = progress, plan, resources
        self.first_step, self.started = progress.step, time.monotonic()
        self.earlier_seconds, self.saved = progress.seconds, time.monotonic()

    def record(self, labels: Sequence[str], sums: Tensor, norm: float, on_step: OnStep | None) -> None:
        """Add a step to the history and report it where it is due."""
        progress, elapsed = self.progress, time.monotonic() - self.started
        progress.seconds = self.earlier_seconds + elapsed
        losses = {}
        for label, (total, count) in zip(labels, sums.tolist(), strict=False):
            if count and math.isfinite(total):
                losses[label] = total / count
                progress.history.append(
                    {"step": progress.step, "label": label, "loss": total / count, "num_samples": int(count)}
                )
        is_due = progress.step % self.resources.log_every_steps == 0 or progress.step == self.plan.num_steps
        if on_step is None or not is_due or not losses:
            return
        rate = (progress.step - self.first_step) / max(elapsed, 1e-9)
        on_step(
            {
                "step": progress.step,
                "num_steps": self.plan.num_steps,
                "loss": float(sums[:-1, 0].nansum() / sums[:-1, 1].sum()),
                "losses": losses,
                "gradient_norm": norm,
                "num_skipped": progress.num_skipped,
                "learning_rate_factor": learning_rate_factor(
                    progress.step - 1, self.plan.num_steps, self.plan.optimizer
                ),
                "samples_per_second": rate * self.plan.batch_size,
                "eta_seconds": (self.plan.num_steps - progress.step) / max(rate, 1e-9),
            }
        )

    def checkpoint_is_due(self) -> bool:
        """Whether the time between checkpoints has passed."""
        return time.monotonic() - self.saved >= self.resources.checkpoint_every_seconds

    def checkpoint_done(self) -> None:
        """Start the checkpoint timer again."""
        self.saved = time.monotonic()


@contextmanager
def _catch_signals(event: threading.Event) -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into an event while the loop runs (in the main thread; elsewhere nothing is caught)."""
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
