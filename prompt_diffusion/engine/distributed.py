"""The processes of one training: who am I, how many are we, and how do we add things up."""

import os
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from prompt_diffusion.device import choose_device

CPU = torch.device("cpu")
_BUCKET_BYTES = 1 << 28


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

    def describe(self) -> dict[str, str | int | float]:
        """Return what this process runs on: device, processes in all, its machine's cores, threads and memory."""
        is_gpu = self.device.type == "cuda"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {
            "device": torch.cuda.get_device_name(self.device) if is_gpu else f"CPU {platform.machine()}",
            "processes": self.size,
            "threads_per_process": torch.get_num_threads(),
            "cpu_cores": os.cpu_count() or 0,
            "memory_gigabytes": round(memory / 1e9, 1),
        }

    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in messages of ``_BUCKET_BYTES`` at most.

        A gradient that is larger goes alone, as it lies. While one message travels, the next is packed.
        """
        if self.size == 1:
            return
        travelling: _Message | None = None
        for gradients in _fill_buckets([p.grad for p in parameters if p.grad is not None]):
            message = _Message(gradients)
            if travelling is not None:
                travelling.unpack()
            travelling = message
        if travelling is not None:
            travelling.unpack()

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        self.sum_in_place(torch.zeros(1))


class _Message:
    """Gradients on their way to their sum."""

    def __init__(self, gradients: list[Tensor]) -> None:
        alone = len(gradients) == 1 and gradients[0].is_contiguous()
        self.gradients = [] if alone else gradients
        self.flat = gradients[0] if alone else torch.cat([gradient.flatten() for gradient in gradients])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def unpack(self) -> None:
        """Wait for the sum and put it where the gradients were."""
        assert self.work is not None
        self.work.wait()
        offset = 0
        for gradient in self.gradients:
            gradient.copy_(self.flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def _fill_buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in order, as many at a time as ``_BUCKET_BYTES`` hold, one at least."""
    bucket: list[Tensor] = []
    room = _BUCKET_BYTES
    for gradient in gradients:
        if bucket and gradient.nbytes > room:
            yield bucket
            bucket, room = [], _BUCKET_BYTES
        bucket.append(gradient)
        room -= gradient.nbytes
    if bucket:
        yield bucket


ALONE = World()


@contextmanager
def join_world(device: str, threads: int) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; alone where there is none."""
    torch.set_num_threads(threads)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        # sums of numbers that the CPU holds go by gloo in either case
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()
