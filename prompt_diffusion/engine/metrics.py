"""What a run reports: its losses, its speed, its memory, and how far it is."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prompt_diffusion.engine.checkpoint import Progress
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.objective import LoopPlan, Objective, OnStep
from prompt_diffusion.engine.optimizer import learning_rate_factor


class Meter:
    """Keeps the history and the clock of a run, and reports on the main process."""

    def __init__(
        self, progress: Progress, plan: LoopPlan, resources: TrainResources, world: World, on_step: OnStep | None
    ) -> None:
        self.progress, self.plan, self.resources, self.device = progress, plan, resources, world.device
        self.on_step = on_step if world.is_main else None
        self.flop_per_sample: int | None = None
        self._is_counted = self.on_step is None
        self._earlier_seconds, self._started = progress.seconds, time.monotonic()
        self._reported = progress.step, self._started

    def record(self, labels: Sequence[str], sums: Tensor, norm: float) -> None:
        """Add a step to the history and report it where it is due; speed is that since the last report."""
        progress, now = self.progress, time.monotonic()
        progress.seconds = self._earlier_seconds + now - self._started
        losses = {}
        for label, (total, count) in zip(labels, sums.tolist(), strict=False):
            if count and math.isfinite(total):
                losses[label] = total / count
                progress.history.append(
                    {"step": progress.step, "label": label, "loss": total / count, "num_samples": int(count)}
                )
        is_due = progress.step % self.resources.log_every_steps == 0 or progress.step == self.plan.num_steps
        if self.on_step is None or not is_due or not losses:
            return
        step, reported = self._reported
        rate = (progress.step - step) / max(now - reported, 1e-9)
        self._reported = progress.step, now
        flop, samples_per_second = self.flop_per_sample, rate * self.plan.batch_size
        self.on_step(
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
                "samples_per_second": samples_per_second,
                "eta_seconds": (self.plan.num_steps - progress.step) / rate,
                "device_memory_bytes": measure_memory(self.device),
                "gigaflop_per_sample": None if flop is None else flop / 1e9,
                "model_flops_per_second": None if flop is None else flop * samples_per_second,
            }
        )

    def count_once(self, objective: Objective[Any]) -> None:
        """Count a sample's arithmetic unless that is done or nobody would hear of it; it leaves gradients behind."""
        if not self._is_counted:
            index = self.progress.step * self.plan.batch_size
            self.flop_per_sample = count_flop(objective, index, self.device, is_compiled=self.resources.compile)
            self._is_counted = True


def count_flop(objective: Objective[Any], index: int, device: torch.device, is_compiled: bool) -> int | None:
    """Return the floating-point operations of a sample's forward and backward pass, leaving gradients behind.

    What a backward pass computes again counts too. None where no operation is one that torch can count.
    """
    # A compiled network hides its operations: for this one sample it runs as it was written.
    stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), stance, FlopCounterMode(display=False) as counter:
        losses, _ = objective.compute_losses(objective.prepare(range(index, index + 1)))
        losses.sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()) or None


def measure_memory(device: torch.device) -> int:
    """Return the most bytes so far that tensors took on a GPU, or that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
