"""Checkpoints: safetensors and JSON, complete or absent, so that the same command goes on where it stopped.

A checkpoint is a folder ``checkpoints/step-00000500/`` whose ``state.json`` is written last and holds the digests of the
rest: without it, or with a digest that does not fit, the folder does not count.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.engine.optimizer import estimate_state_bytes
from prompt_diffusion.store import storage
from prompt_diffusion.store.digest import digest_file

logger = logging.getLogger(__name__)

WEIGHTS_FILE, OPTIMIZER_FILE, AVERAGES_FILE = "weights.safetensors", "optimizer.safetensors", "averages.safetensors"
_STATE_FILE = "state.json"
_PREFIX = "step-"
_NEWEST_KEPT = 2
_ROOM_FOR_CHECKPOINTS = 3
"""The two newest and the one that is being written."""


@dataclass
class Progress:
    """Where a training stands, beside its tensors."""

    step: int = 0
    """Steps done, those that were skipped among them."""
    num_skipped: int = 0
    """Steps whose update was left out, because loss or gradient was not finite or too large."""
    skipped_in_a_row: int = 0
    """How many of them were the last ones."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record a step and label: ``step``, ``label``, ``loss``, ``num_samples``."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """One record a validation: ``step``, ``loss``."""
    seconds: float = 0.0
    """Seconds of training so far, over all attempts (reported, never used)."""


def choose_kept(steps: Collection[int], validations: Mapping[int, float], num_steps: int, num_spaced: int) -> set[int]:
    """Return which of the checkpoints at ``steps`` are kept: the two newest, the best, and the spaced ones.

    The best has the lowest finite validation loss (``validations``, by step), the earliest of equals. The spaced ones are
    the first at or after each of the ``num_spaced`` marks that part ``num_steps`` evenly. A checkpoint once dropped would
    never be asked for later: to drop as one goes leaves the same as to drop at the end.
    """
    kept = set(sorted(steps)[-_NEWEST_KEPT:])
    scored = [step for step in steps if math.isfinite(validations.get(step, math.nan))]
    if scored:
        kept.add(min(scored, key=lambda step: (validations[step], step)))
    for number in range(1, num_spaced + 1):
        mark = num_steps * number / (num_spaced + 1)
        kept.update(sorted(step for step in steps if step >= mark)[:1])
    return kept


def flatten_optimizers(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return every state tensor of the optimizers under ``{optimizer}.{parameter}.{name}``."""
    return {
        f"{number}.{parameter}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizers(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``flatten_optimizers`` gave; the groups keep the recipe's own settings."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, parameter, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def estimate_checkpoint_bytes(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> int:
    """Return the bytes of a checkpoint's tensors: weights, their averages if the recipe keeps them, optimizer state."""
    weights = sum(parameter.nbytes for parameter in parameters.values())
    return weights * (1 if config.ema_decay is None else 2) + estimate_state_bytes(parameters, config)


def check_room(folder: str, checkpoint_bytes: int) -> None:
    """Raise ValueError where the disk of a local checkpoint folder has not the room that a run begins with."""
    path = storage.local_path(folder)
    if path is None:
        return
    # A run that goes on has some of them already, but never the one that it writes next.
    num_missing = max(_ROOM_FOR_CHECKPOINTS - len(list_checkpoints(folder)), 1)
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    needed, free = num_missing * checkpoint_bytes, shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{num_missing} checkpoints of this training take {needed / 1e9:.3g} GB, and the disk of {folder} has "
            f"{free / 1e9:.3g} GB free"
        )


def write_checkpoint(folder: str, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a checkpoint at ``state["step"]`` below ``folder`` (a URI), its state last.

    ``files``: contiguous tensors on the CPU by name, by file.
    """
    target = storage.join_uri(folder, _name_checkpoint(state["step"]))
    digests = {
        file: _write_tensors(storage.join_uri(target, file), tensors) for file, tensors in files.items() if tensors
    }
    storage.write_bytes(storage.join_uri(target, _STATE_FILE), json.dumps({**state, "digests": digests}).encode())


def drop_checkpoints(folder: str, state: Mapping[str, Any], num_steps: int, num_spaced: int) -> None:
    """Delete what ``choose_kept`` does not keep, and what a killed run left half written."""
    steps = {int(name.removeprefix(_PREFIX)) for name in list_checkpoints(folder)}
    validations = {record["step"]: record["loss"] for record in state["validations"]}
    kept = {_name_checkpoint(step) for step in choose_kept(steps, validations, num_steps, num_spaced)}
    found = {file.split("/")[0] for file in storage.list_files(folder) if file.startswith(_PREFIX)}
    for name in found - kept:
        storage.delete_folder(storage.join_uri(folder, name))


def list_checkpoints(folder: str) -> list[str]:
    """Return the names of the finished checkpoints below a folder, oldest first."""
    return sorted(name.split("/")[0] for name in storage.list_files(folder) if name.endswith(f"/{_STATE_FILE}"))


def restore_checkpoint(
    folder: str, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], averages: Mapping[str, Tensor]
) -> Progress:
    """Load the newest whole checkpoint into what it was made of; a fresh ``Progress`` where there is none."""
    for name in reversed(list_checkpoints(folder)):
        uri = storage.join_uri(folder, name)
        state = json.loads(storage.read_bytes(storage.join_uri(uri, _STATE_FILE)))
        digests = state.pop("digests")
        with _fetch(uri, digests) as files:
            damaged = [file for file, path in files.items() if digest_file(path) != digests[file]]
            if damaged:
                logger.warning("checkpoint %s is damaged (%s): taking the one before", uri, ", ".join(damaged))
                continue
            _fill(parameters, files[WEIGHTS_FILE], uri)
            _fill(averages, files.get(AVERAGES_FILE), uri)
            restore_optimizers(optimizers, dict(_read_tensors(files.get(OPTIMIZER_FILE))))
        return Progress(**state)
    return Progress()


def _name_checkpoint(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _write_tensors(uri: str, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors straight to the disk, a remote file by way of a temporary one; return the digest."""
    path = storage.local_path(uri)
    if path is None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "tensors")
            digest = _write_tensors(str(path), tensors)
            storage.write_from(uri, path)
            return digest
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"cannot write {uri}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest_file(path)


@contextmanager
def _fetch(uri: str, names: Collection[str]) -> Iterator[dict[str, Path]]:
    """Give local paths of the files of a folder that are there, by name; remote ones are copied for as long as it takes."""
    path = storage.local_path(uri)
    if path is not None:
        yield {name: path / name for name in names}
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            with storage.open_input(storage.join_uri(uri, name)) as source, Path(scratch, name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 24)
        yield {name: Path(scratch, name) for name in names}


def _read_tensors(path: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one, in memory of their own; nothing where there is no file."""
    if path is not None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name).clone()


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], path: Path | None, uri: str) -> None:
    missing = set(tensors)
    for name, saved in _read_tensors(path):
        if name not in missing or saved.shape != tensors[name].shape:
            raise ValueError(f"checkpoint {uri} holds other weights than this model trains")
        tensors[name].copy_(saved)
        missing.remove(name)
    if missing:
        raise ValueError(f"checkpoint {uri} holds other weights than this model trains")
