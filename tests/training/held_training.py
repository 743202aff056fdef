"""A real training that waits within its loop until a file is there, so that what a test does to it comes in time.

``build_held_python`` makes the program that a test puts in the place of ``sys.executable``; torchrun and Ray are as ever.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "HELD_TRAINING"
# Ray's workers are nice to everybody else (15), and given up where they take more than a minute to start.
RAY_ON_A_BUSY_MACHINE = "RAY_worker_niceness=0 RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=800"
_HELD_CALL = 7
"""Of the losses, in each process: once a step where a process takes its samples in one batch."""


def build_held_python(folder: Path) -> tuple[str, Path]:
    """Return the path of a program that is called as python is, and the file that its trainings wait for."""
    program, go = folder / "python", folder / "go"
    checkout = Path(__file__).parents[2]
    variables = f"PYTHONPATH={checkout} {VARIABLE}={go} {RAY_ON_A_BUSY_MACHINE}"
    program.write_text(f'#!/bin/sh\nexec env {variables} {sys.executable} -m tests.training.held_training "$@"\n')
    program.chmod(0o755)
    return str(program), go


def hold_loop() -> None:
    """Have this process's training wait in its loop."""
    from prompt_diffusion.training import train

    run_loop, go = train.run_loop, Path(os.environ[VARIABLE])

    def run_held_loop(objective: Any, *arguments: Any, **options: Any) -> Any:
        compute_losses, num_calls = objective.compute_losses, 0

        def wait_and_compute(batch: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            while num_calls >= _HELD_CALL and not go.exists():
                time.sleep(0.01)
            return compute_losses(batch)

        objective.compute_losses = wait_and_compute
        return run_loop(objective, *arguments, **options)

    train.run_loop = run_held_loop


def train_as_ray_worker(task: dict[str, Any]) -> None:
    """Be one of Ray Train's workers."""
    from prompt_diffusion.training import launch_ray

    hold_loop()
    launch_ray._train_worker(task)


def main(arguments: list[str]) -> int:
    """Do what python would with these arguments."""
    if "torch.distributed.run" in arguments:
        *options, _, _, spec = arguments  # -m and the module that trains
        os.execv(sys.executable, [sys.executable, *options, "-m", "tests.training.held_training", spec])
    if "-m" not in arguments:
        from prompt_diffusion.training import run

        hold_loop()
        return run.main(arguments[-1])
    from prompt_diffusion.training import launch_ray

    launch_ray._train_worker = train_as_ray_worker
    return launch_ray.main(arguments[-1])


if __name__ == "__main__":
    # Under its own name, by which Ray sends the worker's function.
    from tests.training import held_training

    sys.exit(held_training.main(sys.argv[1:]))
