"""The metrics of a run: losses, speed, memory, arithmetic."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prompt_diffusion.engine.checkpoint import TrainState
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import OnEvent, StepEvent
from prompt_diffusion.engine.objective import BatchT, LoopPlan, Objective
from prompt_diffusion.engine.optimizer import learning_rate_factor


class MetricsReporter:
    """Records the losses of every step, and reports a ``StepEvent`` on the main process where one is due."""

    def __init__(
        self, state: TrainState, plan: LoopPlan, resources: TrainResources, world: World, on_event: OnEvent | None
    ) -> None:
        self.state, self.plan, self.resources, self.device = state, plan, resources, world.device
        self.on_event = on_event if world.is_main else None
        self.flops_per_sample: int | None = None
        self._is_counted = self.on_event is None
        self._earlier_seconds, self._started = state.seconds, time.monotonic()
        self._reported = state.step, self._started

    def record(self, labels: Sequence[str], sums: Tensor, gradient_norm: float) -> None:
        """Add a step to the history and report it if due; the speed is the average since the last report.

        ``sums``: summed loss and number of samples of each label, float64 (labels, 2); further rows are ignored.
        """
        state, now = self.state, time.monotonic()
        state.seconds = self._earlier_seconds + now - self._started
        losses = {}
        for label, (total, count) in zip(labels, sums.tolist(), strict=False):
            if count and math.isfinite(total):
                losses[label] = total / count
                state.history.append(
                    {"step": state.step, "label": label, "loss": total / count, "num_samples": int(count)}
                )
        is_due = state.step % self.resources.log_every_steps == 0 or state.step == self.plan.num_steps
        if self.on_event is None or not is_due or not losses:
            return
        step, reported = self._reported
        rate = (state.step - step) / max(now - reported, 1e-9)
        self._reported = state.step, now
        flops, samples_per_second = self.flops_per_sample, rate * self.plan.batch_size
        self.on_event(
            StepEvent(
                step=state.step,
                num_steps=self.plan.num_steps,
                loss=float(sums[: len(labels), 0].nansum() / sums[: len(labels), 1].sum()),
                losses=losses,
                gradient_norm=gradient_norm,
                learning_rate_factor=learning_rate_factor(state.step - 1, self.plan.num_steps, self.plan.optimizer),
                num_skipped=state.num_skipped,
                samples_per_second=samples_per_second,
                eta_seconds=(self.plan.num_steps - state.step) / rate,
                device_memory_bytes=measure_peak_memory(self.device),
                gigaflop_per_sample=None if flops is None else flops / 1e9,
                model_flops_per_second=None if flops is None else flops * samples_per_second,
            )
        )

    def count_flops_once(self, objective: Objective[BatchT]) -> None:
        """Count a sample's arithmetic, unless it is counted or nobody listens; leaves gradients behind."""
        if not self._is_counted:
            index = self.state.step * self.plan.batch_size
            self.flops_per_sample = count_flops(objective, index, self.device, is_compiled=self.resources.compile)
            self._is_counted = True


def count_flops(objective: Objective[BatchT], index: int, device: torch.device, is_compiled: bool) -> int | None:
    """Return the floating-point operations of a sample's forward and backward pass; leaves gradients behind.

    Recomputation in the backward pass counts, too. None where torch can count none of the operations.
    """
    # A compiled network hides its operations: this one sample runs in eager mode.
    stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), stance, FlopCounterMode(display=False) as counter:
        losses, _ = objective.compute_losses(objective.prepare(range(index, index + 1)))
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) or None


def measure_peak_memory(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: tensors on a GPU, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
