"""Launching a training: a child process, or several through torchrun, from any process that knows no torch."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from prompt_diffusion.store.manifest import ManifestRef, find_sealed
from prompt_diffusion.training.config import TrainConfig, TrainResources
from prompt_diffusion.training.stage import TrainInputs, identify_train

logger = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: try again, and it goes on
_GRACE_SECONDS = 30.0
_MAX_RESTARTS = 3


class TrainSpec(BaseModel):
    """All that a training process is told, as one JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: TrainConfig
    inputs: TrainInputs
    store_root: str
    resources: TrainResources
    parent_pid: int


class TrainingStoppedError(RuntimeError):
    """The training ended before its last step; its checkpoints are whole and the same command goes on."""


def launch_training(
    config: TrainConfig,
    inputs: TrainInputs,
    store_root: str,
    resources: TrainResources,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> ManifestRef:
    """Run stage ``train`` in child processes and return its sealed reference; at once if it is sealed already.

    ``on_event`` hears what ``run_loop`` reports. ValueError carries the child's own sentence for a user's mistake;
    ``TrainingStoppedError`` says that the run stopped and can go on. Children never outlive this process by more than the
    time of one step.
    """
    sealed = find_sealed(identify_train(config, inputs), store_root)
    if sealed is not None:
        return sealed
    spec = TrainSpec(
        config=config,
        inputs=inputs.narrow(config.vision_tasks),
        store_root=store_root,
        resources=resources,
        parent_pid=os.getpid(),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spec.json"
        file.write_text(spec.model_dump_json())
        command = build_command(file, resources)
        logger.info("training: %s", " ".join(command))
        final = _run(command, resources, on_event)
    if "sealed" not in final:
        raise TrainingStoppedError("the training was stopped: run the same command to go on from its last checkpoint")
    return ManifestRef.model_validate(final["sealed"])


def build_command(spec_file: Path, resources: TrainResources) -> list[str]:
    """Return the command line of a training: python alone for one process, torchrun for several."""
    target = ["-m", "prompt_diffusion.training.run", str(spec_file)]
    if resources.num_processes == 1:
        return [sys.executable, *target]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={resources.num_processes}"]
    return [sys.executable, *torchrun, f"--max-restarts={_MAX_RESTARTS}", *target]


def _run(
    command: list[str], resources: TrainResources, on_event: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    """Run the command, pass its events on, and return the last one; an interrupt lets the child save first."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(resources.threads_per_process),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits sleeps: spinning costs far more where the machine is shared
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    last: dict[str, Any] = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last = _parse_event(line) or last
            if on_event is not None and "step" in last:
                on_event(last)
        code = process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if "error" in last:
        raise ValueError(last["error"])
    if code not in (0, STOPPED_EXIT_CODE):
        raise TrainingStoppedError(f"the training process ended with exit code {code}; its last checkpoint is whole")
    return last


def _parse_event(line: str) -> dict[str, Any] | None:
    """Return the event of a line, None for a line that is none (libraries print where they like)."""
    try:
        event = json.loads(line)
    except ValueError:
        logger.info("%s", line.rstrip())
        return None
    return event if isinstance(event, dict) else None
