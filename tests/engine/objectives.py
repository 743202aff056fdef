"""Objectives whose every number can be worked out, and loops over them; no pytest, since child processes import this."""

import math
import os
import signal
from pathlib import Path

import torch

from prompt_diffusion.engine.checkpoint import TrainState
from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.store.uris import join_uri

BATCH_SIZE = 8


class Parabola:
    """Sample i pulls the one parameter towards i modulo 5."""

    labels = ("parabola",)

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.asked: list[range] = []
        self.broken_steps: set[int] = set()
        self.gain: dict[int, float] = {}
        self.most_samples = BATCH_SIZE

    def prepare(self, indices: range):
        return indices, torch.tensor([float(index % 5) for index in indices])

    def compute_losses(self, batch):
        indices, targets = batch
        self.asked.append(indices)
        if len(indices) > self.most_samples:
            raise torch.OutOfMemoryError(f"{len(indices)} samples")
        losses = (self.weight.view(1, -1) - targets[:, None]).square().sum(dim=1)
        steps = [index // BATCH_SIZE for index in indices]
        factors = [math.nan if step in self.broken_steps else self.gain.get(step, 1.0) for step in steps]
        return losses * torch.tensor(factors), [0] * len(indices)


class Line:
    """Each sample pulls the weights by one."""

    labels = ("line",)

    def __init__(self, size: int = 3) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def prepare(self, indices: range):
        return indices

    def compute_losses(self, batch):
        return self.weight.sum().expand(len(batch)), [0] * len(batch)


class Slope:
    """One product a sample, 3 by 4 and 4 by 5, whose arithmetic is 2 * 3 * 4 * 5 forward and as much for each gradient."""

    labels = ("slope",)

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(4, 5))

    def prepare(self, indices: range):
        return torch.stack([torch.full((3, 4), float(index % 7)) for index in indices])

    def compute_losses(self, batch):
        return (batch @ self.weight - 1.0).square().flatten(1).mean(dim=1), [0] * len(batch)


def plan_loop(folder, num_steps: int = 6, **fields) -> LoopPlan:
    optimizer = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, **fields)
    return LoopPlan(num_steps, BATCH_SIZE, optimizer, join_uri(str(folder), "checkpoints"))


def train(
    tmp_path, objective: Parabola, num_steps: int = 6, device_batch_size: int = 8, every: float = 1e-9, **fields
) -> TrainState:
    resources = TrainResources(device_batch_size=device_batch_size, checkpoint_every_seconds=every)
    return run_loop(
        objective, {"weight": objective.weight}, plan_loop(tmp_path, num_steps, **fields), resources, SINGLE_PROCESS
    )


def run_line(folder: Path, line: Line, num_steps: int, every: float = 1e-9) -> TrainState:
    plan = LoopPlan(num_steps, 2, OptimizerConfig(learning_rate=0.1), str(folder))
    resources = TrainResources(checkpoint_every_seconds=every)
    return run_loop(line, {"weight": line.weight}, plan, resources, SINGLE_PROCESS)


def stop_at(objective: Parabola, step: int) -> None:
    """Have an objective interrupt the run at a step, before its gradient."""
    compute_losses = objective.compute_losses

    def interrupt(batch):
        if batch[0].start >= step * BATCH_SIZE:
            raise KeyboardInterrupt
        return compute_losses(batch)

    objective.compute_losses = interrupt  # type: ignore[method-assign]


def signal_at(objective: Parabola, step: int) -> None:
    """Have an objective send this process SIGTERM while it computes a step."""
    compute_losses = objective.compute_losses

    def ask_to_stop(batch):
        if batch[0].start // BATCH_SIZE == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_losses(batch)

    objective.compute_losses = ask_to_stop  # type: ignore[method-assign]
