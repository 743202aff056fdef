"""Distributed training: this process's rank and device, and the collectives between processes."""

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
from prompt_diffusion.engine.events import HardwareEvent

CPU = torch.device("cpu")
_BUCKET_BYTES = 1 << 28


@dataclass(frozen=True)
class World:
    """One process of a training."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    stop_requested: threading.Event = field(default_factory=threading.Event)
    """Asks the loop to save a checkpoint and stop; set by a signal, or by another thread."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and reports."""
        return self.rank == 0

    def describe_hardware(self) -> HardwareEvent:
        """Return what this process runs on."""
        is_gpu = self.device.type == "cuda"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HardwareEvent(
            device=torch.cuda.get_device_name(self.device) if is_gpu else f"CPU {platform.machine()}",
            num_processes=self.size,
            threads_per_process=torch.get_num_threads(),
            cpu_cores=os.cpu_count() or 0,
            memory_gigabytes=round(memory / 1e9, 1),
        )

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def all_reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in buckets of at most ``_BUCKET_BYTES``.

        A larger gradient is reduced alone, without a copy. While one bucket is reduced, the next one is flattened.
        """
        if self.size == 1:
            return
        pending: _Bucket | None = None
        for gradients in _fill_buckets([p.grad for p in parameters if p.grad is not None]):
            bucket = _Bucket(gradients)
            if pending is not None:
                pending.finish()
            pending = bucket
        if pending is not None:
            pending.finish()

    def barrier(self) -> None:
        """Return once every process has called this."""
        self.all_reduce(torch.zeros(1))


class _Bucket:
    """Gradients that are being all-reduced as one flat tensor."""

    def __init__(self, gradients: list[Tensor]) -> None:
        alone = len(gradients) == 1 and gradients[0].is_contiguous()
        self.gradients = [] if alone else gradients
        self.flat = gradients[0] if alone else torch.cat([gradient.flatten() for gradient in gradients])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self) -> None:
        """Wait for the sum and copy it back into the gradients."""
        assert self.work is not None
        self.work.wait()
        offset = 0
        for gradient in self.gradients:
            gradient.copy_(self.flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def _fill_buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in order, as many at a time as fit into ``_BUCKET_BYTES``, at least one."""
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


SINGLE_PROCESS = World()


@contextmanager
def join_world(device: str, threads: int, *, is_alone: bool = False) -> Iterator[World]:
    """Join the process group that torchrun's environment variables describe; without them, be the only process.

    ``is_alone`` says that this training has one process: such variables, left by a batch system, then count for nothing.
    """
    torch.set_num_threads(threads)
    environment = {} if is_alone else os.environ
    size, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    chosen = choose_device(device, int(environment.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        # tensors on the CPU are reduced by gloo in either case
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()
