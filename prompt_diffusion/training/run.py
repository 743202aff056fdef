"""The process that trains: ``python -m prompt_diffusion.training.run SPEC.json``, alone or under torchrun.

The main process prints one JSON object a line on standard output: its progress, then the sealed reference. On a terminal,
run by hand, it prints lines for people instead.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn, TextIO

import torch

from prompt_diffusion.engine.distributed import join_world
from prompt_diffusion.engine.loop import Stopped
from prompt_diffusion.store.storage import read_bytes
from prompt_diffusion.training.launch import LAUNCHER_VARIABLE, SAVING_SECONDS, STOPPED_EXIT_CODE
from prompt_diffusion.training.preflight import check_gpus
from prompt_diffusion.training.stage import Train, TrainSpec
from prompt_diffusion.training.train import run_train

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
USER_ERROR = 2
USER_ERRORS = (ValueError, FloatingPointError, MemoryError)
"""What another attempt would meet again."""


def main(spec_uri: str) -> int:
    """Train as the specification says; 0 when sealed, ``STOPPED_EXIT_CODE`` when asked to stop, 2 for a user's mistake.

    Under torchrun always 0 once everything is said: it would start again whatever ends otherwise.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    spec = TrainSpec.model_validate_json(read_bytes(spec_uri))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # before the loop and after it; the loop itself ends its step first
    end_with_launcher(os.getppid() if under_torchrun else None)
    try:
        check_gpus(spec.resources, torch.cuda.device_count())
        with join_world(spec.resources.device, spec.resources.threads_per_process) as world:
            ref = run_train(Train(spec.config, spec.inputs), spec.store_root, spec.resources, world, emit)
            if ref is not None and world.is_main:
                emit({"sealed": ref.model_dump()})
    except Stopped as stopped:
        logger.info("%s", stopped)
        return 0 if under_torchrun else STOPPED_EXIT_CODE
    except USER_ERRORS as error:
        emit({"error": str(error)})
        return 0 if under_torchrun else USER_ERROR
    return 0


def _leave(*_: object) -> NoReturn:
    raise Stopped("stopped outside the training loop; run the same command to go on")


def emit(event: dict[str, Any], stream: TextIO | None = None) -> None:
    """Print an event in one line, on standard output unless told otherwise: JSON, or for a person at a terminal."""
    out = sys.stdout if stream is None else stream
    out.write((format_event(event) if out.isatty() else json.dumps(event)) + "\n")
    out.flush()


def format_event(event: dict[str, Any]) -> str:
    """Return an event as a person reads it."""
    if "error" in event:
        return f"error: {event['error']}"
    if "sealed" in event:
        return f"sealed: {event['sealed']['uri']}"
    if "hardware" in event:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in event["hardware"].items())
    step = f"step {event['step']} of {event['num_steps']}"
    if "validation_loss" in event:
        return f"{step}, validation loss {event['validation_loss']:.4f}"
    if "grid_uri" in event:
        return f"{step}, validation pictures: {event['grid_uri']}"
    left = timedelta(seconds=round(event["eta_seconds"]))
    parts = [step, f"loss {event['loss']:.4f}", f"{event['samples_per_second']:.1f} samples/s", f"{left} left"]
    if event.get("device_memory_bytes"):
        parts.append(f"{event['device_memory_bytes'] / 1e9:.1f} GB")
    if event.get("model_flops_per_second"):
        parts.append(f"{event['model_flops_per_second'] / 1e12:.3g} TFLOP/s")
    parts.append(f"gradient norm {event['gradient_norm']:.3g}")
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in event["losses"].items())
    return f"{', '.join(parts)} ({losses})"


def end_with_launcher(torchrun_pid: int | None = None) -> None:
    """Stop as for SIGTERM once the launching process or torchrun is gone, however it died: nobody would read what comes out.

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
