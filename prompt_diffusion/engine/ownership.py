"""Of several runs of one training, one trains; the others wait, and resume where it stops, or return what it sealed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.store.lease import BEAT_SECONDS, PATIENCE_SECONDS, Lease
from prompt_diffusion.store.manifest import is_sealed

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 3.0


@contextmanager
def own_stage(
    folder: str, world: World, beat_seconds: float = BEAT_SECONDS, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[Callable[[], None]]:
    """Keep other runs out of a stage's folder (a URI) during the block, after waiting for the run that holds it.

    Every process of the world calls it, and none may rely afterwards on what it knew of the folder before. Yields a
    function that the main process calls before each write: it raises LeaseLostError where another run has taken over.
    Raises ``Stopped`` if asked to stop while waiting.
    """
    lease = Lease(folder, beat_seconds, patience_seconds) if world.is_main else None
    try:
        _wait(lease, folder, world)
        yield _do_nothing if lease is None else lease.check
    finally:
        if lease is not None:
            lease.release(is_finished=_is_finished(folder))


def _wait(lease: Lease | None, folder: str, world: World) -> None:
    """Return on every process once the main one holds the lease."""
    has_said = False
    while True:
        is_held = lease is not None and lease.try_acquire()
        # reduced, so that every process leaves at the same time
        state = torch.tensor([float(is_held), float(world.stop_requested.is_set())])
        world.all_reduce(state)
        if state[0] > 0:
            return
        if state[1] > 0:
            world.stop_requested.clear()  # honoured: what runs later in this process is not stopped by it
            raise Stopped(f"stopped while another run makes {folder}; run the same command to wait for it again")
        if lease is not None and not has_said:
            logger.info("another run makes %s (%s): waiting for it", folder, lease.describe_holder())
            has_said = True
        world.stop_requested.wait(_SECONDS_BETWEEN_LOOKS)


def _is_finished(folder: str) -> bool:
    try:
        return is_sealed(folder)
    except OSError:  # the store is unreachable: what ended the block matters, not that
        return False


def _do_nothing() -> None:
    """Stand in for the check in a process that writes nothing."""
