"""What surrounds a training that Prefect runs: GPU slots, the MLflow run, log lines and stop requests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import Event
from prompt_diffusion.registry import RunTracker
from prompt_diffusion.settings import load_settings
from prompt_diffusion.store.manifest import find_sealed
from prompt_diffusion.store.records import Progress
from prompt_diffusion.store.stage import Context, Report
from prompt_diffusion.tracking.facts import flatten
from prompt_diffusion.training.launch import TrainingStoppedError
from prompt_diffusion.training.stage import Train
from tasks.progress import log_training
from tasks.slots import occupy_gpus

R = TypeVar("R")

# Signals reach only the main thread; this passes them on to trainings that other threads wait for.
_STOP_REQUESTED = threading.Event()


@contextmanager
def follow_training(stage: Train, context: Context[R]) -> Iterator[Report]:
    """Yield the listener for a training's events, and hold its GPUs; the MLflow run ends with the block."""
    resources = context.resources
    assert isinstance(resources, TrainResources)
    log_event = log_training(stage.title)
    changed = flatten({"resources": resources.model_dump(mode="json", exclude_defaults=True)})
    with RunTracker(load_settings(), stage.title, stage.identity, changed) as tracker, occupy_gpus(resources):

        def report(progress: Progress) -> None:
            if is_stopping():
                raise TrainingStoppedError(
                    f"{stage.title} was stopped: run the same command to go on from its last checkpoint"
                )
            assert isinstance(progress, Event)
            tracker.log_event(progress)
            log_event(progress)

        yield report
        model = find_sealed(stage.identity, context.store)
        if model is not None:
            tracker.finish(model)


def is_stopping() -> bool:
    """Say whether the run was asked to stop."""
    return _STOP_REQUESTED.is_set()


@contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """Make every training save a checkpoint and stop if an exception, such as an interrupt, ends the block."""
    _STOP_REQUESTED.clear()
    try:
        yield
    except BaseException:
        _STOP_REQUESTED.set()
        raise
