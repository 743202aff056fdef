"""The training loop: any objective, one process or many, resumable from every checkpoint.

A *step* is one update of the weights from ``batch_size`` samples; the batch is split among the processes, and each accumulates
gradients over micro-batches of ``device_batch_size``. The loss of a step is the mean over its whole batch.
"""

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prompt_diffusion.engine.checkpoint import TrainState, check_room, estimate_checkpoint_bytes, restore_checkpoint
from prompt_diffusion.engine.checkpoint_writer import CheckpointWriter
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import OnEvent
from prompt_diffusion.engine.metrics import MetricsReporter
from prompt_diffusion.engine.objective import BatchT, LoopPlan, Objective, Validate
from prompt_diffusion.engine.optimizer import build_optimizers, learning_rate_factor, set_learning_rates
from prompt_diffusion.engine.prefetch import Prefetcher
from prompt_diffusion.engine.profiler import profile_steps
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.engine.validation import PeriodicValidation

logger = logging.getLogger(__name__)

_MAX_SKIPS_IN_A_ROW = 5
_CPU_MICRO_BATCH = 16
"""Micro-batch size of a CPU, unless one is configured: a larger one is no faster."""


def run_loop(
    objective: Objective[BatchT],
    parameters: Mapping[str, Tensor],
    plan: LoopPlan,
    resources: TrainResources,
    world: World,
    on_event: OnEvent | None = None,
    validate: Validate | None = None,
) -> TrainState:
    """Train from the newest checkpoint to the last step; the parameters are changed in place.

    The main process reports a ``StepEvent`` every ``log_every_steps``, and validates, with the EMA weights where there are
    any, every ``validate_every_steps`` and at the last step. A step whose loss or gradient is not finite, or too large for the
    recipe, changes nothing and is counted. Where a device is out of memory, micro-batches are halved.
    Raises ``Stopped`` after SIGTERM or SIGINT, with a checkpoint saved; FloatingPointError after five skipped steps in a row,
    with the last good checkpoint left; MemoryError where one sample does not fit into memory; ValueError, before the first
    step, where the disk has no room for checkpoints; OSError where one cannot be written.
    """
    if plan.batch_size % world.size:
        raise ValueError(f"a batch of {plan.batch_size} samples does not divide among {world.size} processes")
    if world.is_main:
        check_room(plan.checkpoints, estimate_checkpoint_bytes(parameters, plan.optimizer))
    optimizers = build_optimizers(parameters, plan.optimizer, world)
    ema = {} if plan.optimizer.ema_decay is None else {name: p.detach().clone() for name, p in parameters.items()}
    state = restore_checkpoint(plan.checkpoints, parameters, optimizers, ema)
    metrics = MetricsReporter(state, plan, resources, world, on_event)
    validation = PeriodicValidation(validate if world.is_main else None, state, plan, resources, metrics.on_event)
    steps, size = range(state.step, plan.num_steps), choose_micro_batch_size(plan, resources, world)
    with (
        _catch_signals(world.stop_requested) as stop_requested,
        Prefetcher(objective.prepare, steps, plan.batch_size, world, size, resources.loader_threads) as batches,
        CheckpointWriter(plan.checkpoints, plan.num_steps, resources, plan.check_owner) as writer,
        profile_steps(plan.checkpoints, state.step, resources, world) as advance_profiler,
    ):
        validation.run_if_due(parameters, ema)  # where the last attempt was stopped right before it
        for step in steps:
            # gradients, summed over micro-batches and processes
            set_learning_rates(optimizers, learning_rate_factor(step, plan.num_steps, plan.optimizer))
            sums = _accumulate_gradients(objective, batches, parameters, plan, world, step)
            # the last entry says whether to stop: reduced, so that every process leaves at the same step
            sums[-1, 0] = float(stop_requested.is_set())
            world.all_reduce(sums)
            gradient_norm = _clip_grad_norm(parameters, plan.optimizer.clip_norm)
            # update of the weights
            state.step += 1
            if _is_valid_step(sums, gradient_norm, plan.optimizer.skip_norm):
                state.skipped_in_a_row = 0
                for optimizer in optimizers:
                    optimizer.step()
                if plan.optimizer.ema_decay is not None:
                    _update_ema(ema, parameters, plan.optimizer.ema_decay)
            else:
                _count_skipped_step(state, gradient_norm)
            # metrics, validation, checkpoint
            metrics.count_flops_once(objective)
            _zero_grad(parameters)
            metrics.record(objective.labels, sums, gradient_norm)
            stops = bool(sums[-1, 0] > 0) and state.step < plan.num_steps
            is_best = not stops and validation.run_if_due(parameters, ema)
            if world.is_main and (stops or is_best or state.step == plan.num_steps or writer.is_due):
                writer.save(parameters, optimizers, state, ema)
            advance_profiler()
            if stops:
                writer.wait()
                world.barrier()  # a launcher ends the others once one has left
                stop_requested.clear()  # honoured: a later loop in this process is not stopped by it
                raise Stopped(f"stopped at step {state.step} of {plan.num_steps}; run the same command to go on")
    if ema:
        _update_ema(parameters, ema, 0.0)
    return state


def choose_micro_batch_size(plan: LoopPlan, resources: TrainResources, world: World) -> int:
    """Return the micro-batch size to begin with: as configured, else a GPU's whole share of the batch."""
    share = plan.batch_size // world.size
    return resources.device_batch_size or (share if world.device.type == "cuda" else min(share, _CPU_MICRO_BATCH))


@torch.no_grad()
def _update_ema(ema: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """Move each average towards its parameter; decay 0 copies the parameter."""
    torch._foreach_lerp_(list(ema.values()), list(parameters.values()), 1.0 - decay)


def _is_valid_step(sums: Tensor, gradient_norm: float, skip_norm: float | None) -> bool:
    """Return whether to update the weights: the same on every process, since sums and gradients are."""
    is_finite = bool(torch.isfinite(sums).all()) and math.isfinite(gradient_norm)
    return is_finite and (skip_norm is None or gradient_norm <= skip_norm)


def _count_skipped_step(state: TrainState, gradient_norm: float) -> None:
    state.num_skipped += 1
    state.skipped_in_a_row += 1
    logger.warning(
        "step %d is skipped: its loss is not finite, or its gradient's norm is %g", state.step, gradient_norm
    )
    if state.skipped_in_a_row == _MAX_SKIPS_IN_A_ROW:
        raise FloatingPointError(
            f"steps {state.step - _MAX_SKIPS_IN_A_ROW + 1} to {state.step} had losses or gradients that are not finite "
            "or too large: stopped; the last checkpoint is whole"
        )


def _accumulate_gradients(
    objective: Objective[BatchT],
    batches: Prefetcher[BatchT],
    parameters: Mapping[str, Tensor],
    plan: LoopPlan,
    world: World,
    step: int,
) -> Tensor:
    """Leave the mean gradient over the batch in the parameters.

    Return the summed loss and the number of samples of each label, of this process alone: float64 (labels + 1, 2), the last
    row free.
    """
    while True:
        try:
            sums = _forward_backward(objective, batches.take(step), plan.batch_size)
            break
        except torch.OutOfMemoryError as error:
            if batches.micro_batch_size == 1:
                raise MemoryError(f"one sample does not fit into the memory of {world.device}: {error}") from error
        # Outside the handler: by now the error and the tensors that it kept alive are freed.
        batches.halve_micro_batch(step)
        logger.warning("out of memory: micro-batches of %d from here on, the same batch", batches.micro_batch_size)
        _zero_grad(parameters)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.all_reduce_gradients(list(parameters.values()))
    return sums


def _forward_backward(objective: Objective[BatchT], batches: Iterator[BatchT], batch_size: int) -> Tensor:
    values, labels = [], []
    for batch in batches:
        losses, batch_labels = objective.compute_losses(batch)
        (losses.sum() / batch_size).backward()  # type: ignore[no-untyped-call]
        values.append(losses.detach())
        labels += batch_labels
    sums = torch.zeros(len(objective.labels) + 1, 2, dtype=torch.float64)
    # One host sync per step: between micro-batches the device computes while the CPU prepares the next one.
    read = torch.cat(values).double().cpu()
    sums.index_add_(0, torch.tensor(labels), torch.stack([read, torch.ones_like(read)], dim=1))
    return sums


def _zero_grad(parameters: Mapping[str, Tensor]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _clip_grad_norm(parameters: Mapping[str, Tensor], clip_norm: float | None) -> float:
    """Clip the gradients, if the recipe says so; return their norm over all parameters before clipping."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), clip_norm, norm)
    return float(norm)


@contextmanager
def _catch_signals(event: threading.Event) -> Iterator[threading.Event]:
    """Set the event at SIGTERM or SIGINT while the block runs; outside the main thread no signal is caught."""
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
