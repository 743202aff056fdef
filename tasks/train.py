"""Latents and trainings, as tasks; a training runs in child processes of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.registry import RunTracker
from prompt_diffusion.settings import load_settings
from prompt_diffusion.store.manifest import ManifestRef, find_sealed
from prompt_diffusion.tracking.facts import flatten
from prompt_diffusion.tracking.finishing import finish_run
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import (
    EncodeConfig,
    EncodeResources,
    identify_encode,
    identify_encode_text,
    run_encode,
    run_encode_text,
)
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError, launch_training
from prompt_diffusion.training.stage import TrainInputs, identify_train
from tasks.caching import DAY_SECONDS, build_stage_options, is_transient
from tasks.progress import log_progress, log_training
from tasks.slots import occupy_gpus

# Signals reach the main thread alone: through this the trainings that other threads wait for hear of them.
_STOP_REQUESTED = threading.Event()


@task(
    name="encode",
    task_run_name="encode {images.stage} {images.fingerprint:.8}",
    **build_stage_options(identify_encode, timeout_seconds=7 * DAY_SECONDS),
)
def encode(config: EncodeConfig, images: ManifestRef, store: str, resources: EncodeResources) -> ManifestRef:
    """Compute the latents of everything that can be a target."""
    return run_encode(config, images, store, resources, on_progress=log_progress("latents"))


@task(
    name="encode text",
    task_run_name="encode text {pairs.fingerprint:.8}",
    **build_stage_options(identify_encode_text, timeout_seconds=7 * DAY_SECONDS),
)
def encode_text(config: EncodeConfig, pairs: ManifestRef, store: str, resources: EncodeResources) -> ManifestRef:
    """Compute the text embeddings of all captions."""
    return run_encode_text(config, pairs, store, resources, on_progress=log_progress("text embeddings"))


def can_go_on(stage: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Say whether to launch a training again, from its last checkpoint: not where it was asked to stop, or had its time."""
    is_limited = isinstance(state.result(raise_on_failure=False), TimeLimitError)
    return not _STOP_REQUESTED.is_set() and not is_limited and is_transient(stage, run, state)


def name_training(config: TrainConfig) -> str:
    """Return how people call a training: its method, and the vision task of one that knows a single one."""
    method = {"prompt_diffusion": "Prompt Diffusion", "controlnet": "CN(FT)"}[config.method]
    return method if len(config.vision_tasks) > 1 else f"{method} {config.vision_tasks[0]}"


def name_task_run(parameters: dict[str, Any]) -> str:
    """Return the name of a task run of `train`."""
    return f"train {name_training(parameters['config'])}"


# No timeout: Prefect can end no task that waits in a thread, as the baselines do.
@task(
    name="train",
    task_run_name=name_task_run,  # type: ignore[arg-type]  # Prefect's protocol asks a plain function for a method
    **build_stage_options(identify_train, timeout_seconds=None, can_retry=can_go_on),
)
def train(config: TrainConfig, inputs: TrainInputs, store: str, resources: TrainResources) -> ManifestRef:
    """Train one model, or go on with it from its last checkpoint."""
    identity = identify_train(config, inputs)
    sealed = find_sealed(identity, store)
    if sealed is not None:
        finish_run(load_settings(), sealed)  # the process that sealed it may not have come to that
        return sealed
    name = name_training(config)
    log_event = log_training(name)
    changed = flatten({"resources": resources.model_dump(mode="json", exclude_defaults=True)})
    with RunTracker(load_settings(), name, identity, changed) as tracker:

        def report(event: dict[str, Any]) -> None:
            if _STOP_REQUESTED.is_set():
                raise TrainingStoppedError(
                    f"{name} was stopped: run the same command to go on from its last checkpoint"
                )
            tracker.log_event(event)
            log_event(event)

        with occupy_gpus(resources):
            model = launch_training(config, inputs, store, resources, on_event=report)
        tracker.finish(model)
    return model


@contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """Leave no training running behind a block that an interrupt ends: each saves a checkpoint and stops."""
    _STOP_REQUESTED.clear()
    try:
        yield
    except BaseException:
        _STOP_REQUESTED.set()
        raise
