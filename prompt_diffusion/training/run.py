"""The process that trains: ``python -m prompt_diffusion.training.run SPEC.json``, alone or under torchrun.

The main process prints one JSON object a line on standard output: its progress, then the sealed reference.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from prompt_diffusion.training.launch import STOPPED_EXIT_CODE, TrainSpec
from prompt_diffusion.training.loop import Stopped
from prompt_diffusion.training.train import run_train
from prompt_diffusion.training.world import join_world

logger = logging.getLogger(__name__)


def main(spec_file: str) -> int:
    """Train as the specification says; 0 when sealed, ``STOPPED_EXIT_CODE`` when asked to stop, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    spec = TrainSpec.model_validate_json(Path(spec_file).read_text())
    _follow(spec.parent_pid)
    try:
        with join_world(spec.resources.device, spec.resources.threads_per_process) as world:
            ref = run_train(spec.config, spec.inputs, spec.store_root, spec.resources, world, _emit)
            if ref is not None and world.is_main:
                _emit({"sealed": ref.model_dump()})
    except Stopped as stopped:
        logger.info("%s", stopped)
        return STOPPED_EXIT_CODE
    except (ValueError, FloatingPointError, MemoryError) as error:
        _emit({"error": str(error)})
        return 2
    return 0


def _emit(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _follow(parent_pid: int) -> None:
    """Stop as for SIGTERM once the launching process is gone, however it died: nobody would read what comes out."""

    def watch() -> None:
        while True:
            time.sleep(1.0)
            try:
                os.kill(parent_pid, 0)
            except ProcessLookupError:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
