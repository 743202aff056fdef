"""Launching a training from a process that does not load torch: a child, several through torchrun, or many through Ray Train.

Every engine is one command that reads one file and prints one JSON object per line on standard output: progress, then the
sealed reference, or a user's mistake in one sentence. The file lies in the stage's folder of the store and stays there, so
that the command, which is logged, can be run by hand, on any machine that reaches the store.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import ErrorEvent, OnEvent, SealedEvent, parse_event
from prompt_diffusion.store.records import ManifestRef

logger = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: try again, and it resumes
MAX_RESTARTS = 3
SAVING_SECONDS = 60
"""Time that a process has, once it is asked to stop, to finish its step and save a checkpoint."""
LAUNCHER_VARIABLE = "PROMPT_DIFFUSION_LAUNCHER_PID"
"""Names the process that a training ends with; run by hand, a training has none."""
_TORCHRUN_VARIABLES = {
    f"{prefix}{name}" for prefix in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")
} | {"MASTER_ADDR", "MASTER_PORT"}
_GRACE_SECONDS = SAVING_SECONDS + 30.0


class TrainingStoppedError(RuntimeError):
    """The training ended before its last step; its checkpoints are whole and the same command resumes it."""


class TimeLimitError(TrainingStoppedError):
    """The training was stopped by ``resources.time_limit_seconds``: to resume at once would defeat the limit."""


def build_command(spec_uri: str, resources: TrainResources) -> list[str]:
    """Return the command line of a training: Ray's driver, python alone for one process, torchrun for several."""
    if resources.engine == "ray":
        return [sys.executable, "-m", "prompt_diffusion.training.launch_ray", spec_uri]
    target = ["-m", "prompt_diffusion.training.run", spec_uri]
    if resources.num_processes == 1:
        return [sys.executable, *target]
    # After a restart, torch 2.15's processes meet in the store of the previous attempt and look for its dead processes at
    # addresses that nothing listens on: now and then an attempt fails or hangs. May go when that is fixed.
    own_store = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={resources.num_processes}"]
    torchrun += ["--log-dir", os.devnull]  # the processes' output is ours anyway; else a folder is left each time
    patience = [f"--max-restarts={MAX_RESTARTS}", f"--shutdown-timeout={SAVING_SECONDS}"]
    return [*own_store, sys.executable, *torchrun, *patience, *target]


def run_command(command: list[str], resources: TrainResources, on_event: OnEvent) -> ManifestRef | None:
    """Run the command, pass its events on, and return what it sealed; an interrupt lets the training save first."""
    environment = _build_environment(resources)
    model: ManifestRef | None = None
    # A session of its own: a terminal's Ctrl-C is for this process, which passes it on once, to the right one.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout is not None
    with process, _limit_time(process, resources.time_limit_seconds) as was_limited:
        try:
            for line in process.stdout:
                event = parse_event(line)
                if event is None:
                    logger.info("%s", line.rstrip())  # libraries print where they like
                elif isinstance(event, ErrorEvent):
                    raise ValueError(event.message)
                elif isinstance(event, SealedEvent):
                    model = event.manifest
                else:
                    on_event(event)
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if model is not None:
        return model
    if was_limited():
        raise TimeLimitError(
            f"the training reached its time limit of {resources.time_limit_seconds:g} seconds: run the same command to go on "
            "from its last checkpoint"
        )
    if code not in (0, STOPPED_EXIT_CODE):
        raise TrainingStoppedError(f"the training process ended with exit code {code}; its last checkpoint is whole")
    return None


def _build_environment(resources: TrainResources) -> dict[str, str]:
    """Return the variables of a training's processes: what this process has, and the training's own."""
    # What a batch system or an outer torchrun left there is not ours: torchrun sets its own for its processes.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    return inherited | {
        "OMP_NUM_THREADS": str(resources.threads_per_process),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits sleeps: spinning costs far more where the machine is shared
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONSAFEPATH": "1",  # nothing is imported from the current folder, such as a user's own random.py
        LAUNCHER_VARIABLE: str(os.getpid()),
    }


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the process to save and stop, and kill it where it does not."""
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def _limit_time(process: subprocess.Popen[str], seconds: float | None) -> Iterator[Callable[[], bool]]:
    """Stop the process once the time has passed; yields a function that says whether it was."""
    ended, limited = threading.Event(), threading.Event()

    def watch() -> None:
        if not ended.wait(seconds):
            limited.set()
            _stop(process)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield limited.is_set
    finally:
        ended.set()
