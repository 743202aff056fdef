"""The training loop: any objective, one process or many, resumable at every checkpoint.

Letters: a *step* is one update of the weights from ``batch_size`` samples; a step's batch is shared among the processes and
taken in micro-batches of ``device_batch_size``. The loss of a step is the mean over its whole batch.
"""

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prompt_diffusion.engine.checkpoint import Progress, check_room, estimate_checkpoint_bytes, restore_checkpoint
from prompt_diffusion.engine.checkpoint_writer import CheckpointWriter
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.metrics import Meter
from prompt_diffusion.engine.objective import Batch, LoopPlan, Objective, OnStep, Validate
from prompt_diffusion.engine.optimizer import build_optimizers, learning_rate_factor, set_learning_rates
from prompt_diffusion.engine.prefetch import Feed
from prompt_diffusion.engine.validator import Validator

logger = logging.getLogger(__name__)

_MAX_SKIPS_IN_A_ROW = 5
_CPU_SAMPLES = 16
"""Samples a CPU takes at once unless it is told: more make it no faster."""


class Stopped(Exception):  # noqa: N818 - it is no error: the run was asked to stop and saved itself
    """The run was asked to stop (SIGTERM or Ctrl-C) and has saved a checkpoint."""


def run_loop(
    objective: Objective[Any],
    parameters: Mapping[str, Tensor],
    plan: LoopPlan,
    resources: TrainResources,
    world: World,
    on_step: OnStep | None = None,
    validate: Validate | None = None,
) -> Progress:
    """Train from the newest checkpoint to the last step; the parameters are changed in place.

    ``on_step`` gets, on the main process every ``log_every_steps``: step, num_steps, loss, losses by label, gradient_norm,
    learning_rate_factor, num_skipped, samples_per_second, eta_seconds, device_memory_bytes, gigaflop_per_sample and
    model_flops_per_second (None where they cannot be counted). ``validate`` returns the loss at a step, with the averages
    in the weights' place if there are any; the main process calls it every ``validate_every_steps`` and at the last step,
    and ``on_step`` gets step, num_steps, validation_loss, is_best.

    Raises ``Stopped`` after SIGTERM or SIGINT, with a checkpoint saved. A step whose loss or gradient is not finite, or too
    large for the recipe, changes nothing and is counted; after five in a row FloatingPointError, with the last good
    checkpoint left. Where a device's memory does not suffice, micro-batches are halved; MemoryError where one sample is too
    much. ValueError, before the first step, where the disk has no room for checkpoints; OSError where one cannot be written.
    """
    if plan.batch_size % world.size:
        raise ValueError(f"a batch of {plan.batch_size} samples does not divide among {world.size} processes")
    if world.is_main:
        check_room(plan.checkpoints, estimate_checkpoint_bytes(parameters, plan.optimizer))
    optimizers = build_optimizers(parameters, plan.optimizer, world)
    decay = plan.optimizer.ema_decay
    averages = {} if decay is None else {name: p.detach().clone() for name, p in parameters.items()}
    progress = restore_checkpoint(plan.checkpoints, parameters, optimizers, averages)
    meter = Meter(progress, plan, resources, world, on_step)
    validator = Validator(validate if world.is_main else None, progress, plan, resources, meter.on_step)
    steps, size = range(progress.step, plan.num_steps), choose_device_batch(plan, resources, world)
    with (
        _catch_signals(world.stop_requested) as stop_requested,
        Feed(objective.prepare, steps, plan.batch_size, world, size, resources.loader_threads) as feed,
        CheckpointWriter(plan.checkpoints, plan.num_steps, resources, plan.check_owner) as writer,
    ):
        validator.run_if_due(parameters, averages)  # where the run before was stopped right before it
        for step in steps:
            set_learning_rates(optimizers, learning_rate_factor(step, plan.num_steps, plan.optimizer))
            sums = _accumulate(objective, feed, parameters, plan, world, step)
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
            meter.count_once(objective)
            _drop_gradients(parameters)
            meter.record(objective.labels, sums, norm)
            stops = bool(sums[-1, 0] > 0) and progress.step < plan.num_steps
            is_best = not stops and validator.run_if_due(parameters, averages)
            if world.is_main and (stops or is_best or progress.step == plan.num_steps or writer.is_due):
                writer.save(parameters, optimizers, progress, averages)
            if stops:
                writer.wait()
                world.wait_for_all()  # a launcher ends the others once one has left
                stop_requested.clear()  # as was wished: whoever goes on in this process is not stopped by it
                raise Stopped(f"stopped at step {progress.step} of {plan.num_steps}; run the same command to go on")
    if averages:
        _move_averages(parameters, averages, 0.0)
    return progress


def choose_device_batch(plan: LoopPlan, resources: TrainResources, world: World) -> int:
    """Return how many samples a device takes at once to begin with: as told, else a GPU all of its share."""
    share = plan.batch_size // world.size
    return resources.device_batch_size or (share if world.device.type == "cuda" else min(share, _CPU_SAMPLES))


@torch.no_grad()
def _move_averages(averages: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """Move each average towards its parameter; with decay 0, onto it."""
    torch._foreach_lerp_(list(averages.values()), list(parameters.values()), 1.0 - decay)


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
    objective: Objective[Batch],
    feed: Feed[Batch],
    parameters: Mapping[str, Tensor],
    plan: LoopPlan,
    world: World,
    step: int,
) -> Tensor:
    """Leave the batch's mean gradient in the parameters; return sums and counts by label, and one row to spare."""
    while True:
        try:
            sums = _add_up(objective, feed.take(step), plan.batch_size)
            break
        except torch.OutOfMemoryError as error:
            if feed.size == 1:
                raise MemoryError(f"one sample does not fit into the memory of {world.device}: {error}") from error
        # Begun anew, once the error and what it held are gone.
        feed.halve(step)
        logger.warning("out of memory: %d samples at once from here on, the batch stays as it is", feed.size)
        _drop_gradients(parameters)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.sum_gradients(list(parameters.values()))
    return sums


def _add_up(objective: Objective[Batch], batches: Iterator[Batch], batch_size: int) -> Tensor:
    values, labels = [], []
    for batch in batches:
        losses, of_batch = objective.compute_losses(batch)
        (losses.sum() / batch_size).backward()  # type: ignore[no-untyped-call]
        values.append(losses.detach())
        labels += of_batch
    sums = torch.zeros(len(objective.labels) + 1, 2, dtype=torch.float64)
    # One look at the device a step: it computes on while the CPU gets the next micro-batch ready.
    read = torch.cat(values).double().cpu()
    sums.index_add_(0, torch.tensor(labels), torch.stack([read, torch.ones_like(read)], dim=1))
    return sums


def _drop_gradients(parameters: Mapping[str, Tensor]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _clip(parameters: Mapping[str, Tensor], clip_norm: float | None) -> float:
    """Return the norm of the gradient over all parameters, from before it was clipped."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), clip_norm, norm)
    return float(norm)


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
