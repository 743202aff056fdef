"""How a long stage says where it is: a line in the run's log now and then, and a bar in Prefect's page."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from prompt_diffusion.pretraining.stage import PretrainProgress
from prompt_diffusion.store.records import Progress, ShardProgress
from prompt_diffusion.store.stage import Report

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_LOSSES = 60.0
_BAR_WIDTH = 10


def log_progress(what: str, items_per_row: int = 1, unit: str = "rows") -> Report:
    """Return a listener to a sharded stage that tells shards, rate, time left and rejects.

    It writes to the log of the task run that it is made in, and keeps that run's progress artifact.
    """
    logger = get_run_logger()
    first: tuple[ShardProgress, float] | None = None
    said = time.monotonic()
    show_bar = show_progress()

    def report(told: Progress) -> None:
        nonlocal first, said
        assert isinstance(told, ShardProgress)
        now = time.monotonic()
        first = first or (told, now)
        if now - said < _SECONDS_BETWEEN_LINES and told.num_done < told.num_shards:
            return
        said = now
        # Counted from the first report on, for the shards that an earlier run left pass in no time before it.
        num_timed, seconds = told.num_done - first[0].num_done, now - first[1]
        pace = ""
        if num_timed:
            rate = (told.num_rows - first[0].num_rows) * items_per_row / seconds
            left = timedelta(seconds=round((told.num_shards - told.num_done) * seconds / num_timed))
            pace = f", {rate:.1f} {unit}/s, {left} left"
        rejects = f", {told.num_rejects} rejected" if told.num_rejects else ""
        line = f"{told.num_done} of {told.num_shards} shards, {told.num_rows * items_per_row} {unit}{rejects}{pace}"
        logger.info("%s: %s", what, line)
        show_bar(100.0 * told.num_done / told.num_shards, f"{what}: {line}")

    return report


def log_pretraining() -> Report:
    """Return a listener to the pre-training of a base, which has two trainings."""
    listeners = {phase: log_training(phase) for phase in ("vae", "unet")}

    def report(progress: Progress) -> None:
        assert isinstance(progress, PretrainProgress)
        listeners[progress.phase](progress.event)

    return report


def show_progress() -> Callable[[float, str], None]:
    """Return what keeps a bar in Prefect's page, for the task run that it is made in: percent and a description.

    There is one only of work that takes long enough to be looked at. A server that is away for a moment costs the bar an
    update, and the work nothing.
    """
    logger = get_run_logger()
    artifact: Any = None

    def show(percent: float, description: str) -> None:
        nonlocal artifact
        try:
            if artifact is not None:
                update_progress_artifact(artifact, percent, description=description)
            elif percent < 100.0:
                artifact = create_progress_artifact(percent, description=description)
        except httpx.HTTPError as error:
            logger.warning("the bar in Prefect's page stays where it is: %s", error)

    return show


def log_training(name: str) -> Callable[[dict[str, Any]], None]:
    """Return a listener to a training's events.

    It writes a line with a bar, loss, speed and time left now and then, the losses of each vision task more rarely, every
    validation, and the hardware; and keeps the task run's progress artifact.
    """
    logger, show_bar = get_run_logger(), show_progress()
    said = said_losses = 0.0
    losses: dict[str, list[float]] = {}

    def report(event: dict[str, Any]) -> None:
        nonlocal said, said_losses
        if "command" in event:
            logger.info("%s, by hand: %s", name, event["command"])
        if "hardware" in event:
            logger.info("%s: %s", name, describe_hardware(event["hardware"]))
        if "validation_loss" in event:
            best = ", the best so far" if event["is_best"] else ""
            logger.info("%s step %d: validation loss %.4f%s", name, event["step"], event["validation_loss"], best)
        if "loss" not in event:
            return
        for label, loss in event["losses"].items():
            losses.setdefault(label, []).append(loss)
        now, is_last = time.monotonic(), event["step"] == event["num_steps"]
        if now - said >= _SECONDS_BETWEEN_LINES or is_last:
            said = now
            line = describe_step(event)
            logger.info("%s %s", name, line)
            show_bar(100.0 * event["step"] / event["num_steps"], f"{name}: {line.partition('] ')[2]}")
        if len(losses) > 1 and (now - said_losses >= _SECONDS_BETWEEN_LOSSES or is_last):
            said_losses = now
            logger.info("%s", describe_losses(losses))
            losses.clear()

    return report


def describe_step(event: Mapping[str, Any]) -> str:
    """Return a bar, where the training stands, how well and how fast it goes: what is not known is left out."""
    step, num_steps = event["step"], event["num_steps"]
    filled = _BAR_WIDTH * step // num_steps
    parts = [
        f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] step {step} of {num_steps}",
        f"loss {event['loss']:.4f}",
        f"gradient {event['gradient_norm']:.3g}",
        f"{event['samples_per_second']:.1f} samples/s",
    ]
    if event.get("device_memory_bytes"):
        parts.append(f"{event['device_memory_bytes'] / 1e9:.1f} GB")
    if event.get("model_flops_per_second"):
        flops = event["model_flops_per_second"]
        parts.append(f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s")
    if event.get("num_skipped"):
        parts.append(f"{event['num_skipped']} skipped")
    parts.append(f"{timedelta(seconds=round(event['eta_seconds']))} left")
    return ", ".join(parts)


def describe_losses(losses: Mapping[str, Sequence[float]]) -> str:
    """Return the mean loss of each vision task."""
    means = (f"{label.replace('_to_', '→')} {fmean(values):.3f}" for label, values in sorted(losses.items()))
    return "losses " + ", ".join(means)


def describe_hardware(hardware: Mapping[str, Any]) -> str:
    """Return the hardware in one line: what its event says, by name."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in hardware.items())
