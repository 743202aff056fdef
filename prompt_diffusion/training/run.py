"""The process that trains: ``python -m prompt_diffusion.training.run SPEC.json``, alone or under torchrun.

The main process prints its events on standard output, each as one line of JSON; on a terminal, where it was started by hand,
as text.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn, TextIO

import torch

from prompt_diffusion.engine.distributed import join_world
from prompt_diffusion.engine.events import ErrorEvent, Event, SealedEvent, StepEvent, describe, describe_losses
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.store.storage import read_bytes
from prompt_diffusion.training.launch import LAUNCHER_VARIABLE, SAVING_SECONDS, STOPPED_EXIT_CODE
from prompt_diffusion.training.preflight import check_gpus
from prompt_diffusion.training.stage import Train, TrainSpec
from prompt_diffusion.training.train import run_train

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
USER_ERROR = 2
USER_ERRORS = (ValueError, FloatingPointError, MemoryError)
"""Errors that another attempt would raise again."""


def main(spec_uri: str) -> int:
    """Train as the specification says; return 0 when sealed, ``STOPPED_EXIT_CODE`` when asked to stop, 2 for a user's mistake.

    Under torchrun always 0 once the last event is printed: it restarts a process that ends with any other code.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    spec = TrainSpec.model_validate_json(read_bytes(spec_uri))
    is_alone = spec.resources.num_processes == 1  # whatever a shell or a batch system left in the environment
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and not is_alone
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # before the loop and after it; the loop itself ends its step first
    end_with_launcher(os.getppid() if under_torchrun else None)
    try:
        check_gpus(spec.resources, torch.cuda.device_count())
        with join_world(spec.resources.device, spec.resources.threads_per_process, is_alone=is_alone) as world:
            ref = run_train(Train(spec.config, spec.inputs), spec.store_root, spec.resources, world, emit)
            if ref is not None and world.is_main:
                emit(SealedEvent(manifest=ref))
    except Stopped as stopped:
        logger.info("%s", stopped)
        return 0 if under_torchrun else STOPPED_EXIT_CODE
    except USER_ERRORS as error:
        emit(ErrorEvent(message=str(error)))
        return 0 if under_torchrun else USER_ERROR
    return 0


def _leave(*_: object) -> NoReturn:
    raise Stopped("stopped outside the training loop; run the same command to go on")


def emit(event: Event, stream: TextIO | None = None) -> None:
    """Print an event on standard output or another stream: one line of JSON, or on a terminal as text."""
    out = sys.stdout if stream is None else stream
    if out.isatty():
        lines = [
            describe(event),
            *([describe_losses(event.losses)] if isinstance(event, StepEvent) and len(event.losses) > 1 else []),
        ]
    else:
        lines = [event.model_dump_json()]
    out.write("".join(f"{line}\n" for line in lines))
    out.flush()


def end_with_launcher(torchrun_pid: int | None = None) -> None:
    """Stop as after SIGTERM once the launching process or torchrun is gone, however it died: nobody would read the output.

    A process that does not stop then, because it waits for others that are gone, is killed.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    followed = [int(pid) for pid in (launcher, torchrun_pid) if pid is not None]

    def watch() -> None:
        while all(_is_alive(pid) for pid in followed):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    if followed:
        threading.Thread(target=watch, daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
