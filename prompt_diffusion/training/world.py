"""The processes of one training: who am I, how many are we, and how do we add things up."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """One process of a training."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    stop_requested: threading.Event = field(default_factory=threading.Event)
    """The wish to stop: the loop saves and leaves; set by a signal, or by whoever runs the loop outside the main thread."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and reports."""
        return self.rank == 0

    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


ALONE = World()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Return the device of a setting: ``auto`` takes a GPU where there is one; ``cuda`` without a GPU is refused."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for and this machine has no usable GPU: use 'cpu' or 'auto'")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


@contextmanager
def join_world(device: str, threads: int) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; alone where there is none."""
    torch.set_num_threads(threads)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()
