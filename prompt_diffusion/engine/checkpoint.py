"""Checkpoints: safetensors and JSON, complete or absent, so that the same command resumes where it stopped.

A checkpoint is a folder ``checkpoints/step-00000500/`` whose ``state.json`` is written last and holds the digests of the
other files and its own: without it, or with a digest that does not match, the folder is ignored.
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
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.engine.optimizer import estimate_state_bytes
from prompt_diffusion.store import storage
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.uris import join_uri, local_path

logger = logging.getLogger(__name__)

WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE = "weights.safetensors", "optimizer.safetensors", "ema.safetensors"
_EARLIER_EMA_FILE = "averages.safetensors"
"""The name of ``EMA_FILE`` in earlier checkpoints, which can still be resumed."""
_STATE_FILE = "state.json"
_STATE_DIGEST = "sha256"
_PREFIX = "step-"
_NEWEST_KEPT = 2
_ROOM_FOR_CHECKPOINTS = 3
"""The two newest and the one being written."""


class LossRecord(TypedDict):
    """The loss of one label in one step."""

    step: int
    label: str
    loss: float
    num_samples: int


class ValidationRecord(TypedDict):
    """The loss of one validation."""

    step: int
    loss: float


@dataclass
class TrainState:
    """The state of a training apart from its tensors."""

    step: int = 0
    """Steps done, skipped ones included."""
    num_skipped: int = 0
    """Steps without an update, because loss or gradient was not finite or too large."""
    skipped_in_a_row: int = 0
    """How many of the latest steps were skipped in a row."""
    history: list[LossRecord] = field(default_factory=list)
    """The losses of every step, one record for each label in its batch."""
    validations: list[ValidationRecord] = field(default_factory=list)
    """The validations so far."""
    seconds: float = 0.0
    """Seconds of training so far, over all attempts (reported, never used)."""


def choose_kept(steps: Collection[int], validations: Mapping[int, float], num_steps: int, num_spaced: int) -> set[int]:
    """Return which of the checkpoints at ``steps`` are kept: the two newest, the best, and the spaced ones.

    The best has the lowest finite validation loss (``validations``, by step), the earliest on a tie. The spaced ones are
    the first at or after each of the ``num_spaced`` marks that divide ``num_steps`` evenly. Once not kept, a checkpoint is
    never wanted later: deleting after every save leaves the same ones as deleting once at the end.
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
    """Load what ``flatten_optimizers`` returned; the parameter groups keep the recipe's own settings."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, parameter, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def estimate_checkpoint_bytes(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> int:
    """Return the bytes of a checkpoint's tensors: weights, their EMA if the recipe keeps one, optimizer state."""
    weights = sum(parameter.nbytes for parameter in parameters.values())
    return weights * (1 if config.ema_decay is None else 2) + estimate_state_bytes(parameters, config)


def check_room(folder: str, checkpoint_bytes: int) -> None:
    """Raise ValueError where the disk of a local checkpoint folder has too little room for the checkpoints of a run."""
    path = local_path(folder)
    if path is None:
        return
    # A run that resumes has some of them already, but never the one that it writes next.
    num_missing = max(_ROOM_FOR_CHECKPOINTS - len(list_checkpoints(folder)), 1)
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    needed, free = num_missing * checkpoint_bytes, shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{num_missing} checkpoints of this training take {needed / 1e9:.3g} GB, and the disk of {folder} has "
            f"{free / 1e9:.3g} GB free"
        )


def write_checkpoint(folder: str, files: Mapping[str, Mapping[str, Tensor]], state: TrainState) -> None:
    """Write the checkpoint of a step below ``folder`` (a URI), ``state.json`` last.

    ``files``: contiguous tensors on the CPU by name, by file.
    """
    target = join_uri(folder, _name_checkpoint(state.step))
    digests = {file: _write_tensors(join_uri(target, file), tensors) for file, tensors in files.items() if tensors}
    storage.write_bytes(join_uri(target, _STATE_FILE), _encode_state({**vars(state), "digests": digests}))


def delete_checkpoints(folder: str, state: TrainState, num_steps: int, num_spaced: int) -> None:
    """Delete the checkpoints that ``choose_kept`` does not keep, and those that a killed run left incomplete."""
    steps = {int(name.removeprefix(_PREFIX)) for name in list_checkpoints(folder)}
    validations = {record["step"]: record["loss"] for record in state.validations}
    kept = {_name_checkpoint(step) for step in choose_kept(steps, validations, num_steps, num_spaced)}
    found = {file.split("/")[0] for file in storage.list_files(folder) if file.startswith(_PREFIX)}
    for name in found - kept:
        storage.delete_folder(join_uri(folder, name))


def list_checkpoints(folder: str) -> list[str]:
    """Return the names of the finished checkpoints below a folder, oldest first."""
    return sorted(name.split("/")[0] for name in storage.list_files(folder) if name.endswith(f"/{_STATE_FILE}"))


def restore_checkpoint(
    folder: str, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], ema: Mapping[str, Tensor]
) -> TrainState:
    """Load the newest whole checkpoint into the tensors and optimizers; a fresh ``TrainState`` where there is none."""
    for name in reversed(list_checkpoints(folder)):
        uri = join_uri(folder, name)
        try:
            state, digests = _parse_state(storage.read_bytes(join_uri(uri, _STATE_FILE)), name)
            with _fetch(uri, digests) as files:
                damaged = [file for file, path in files.items() if digest_file(path) != digests[file]]
                if damaged:
                    raise _DamagedCheckpointError(f"{', '.join(damaged)} changed")
                _load_into(parameters, files[WEIGHTS_FILE], uri)
                _load_into(ema, files.get(EMA_FILE, files.get(_EARLIER_EMA_FILE)), uri)
                restore_optimizers(optimizers, dict(_read_tensors(files.get(OPTIMIZER_FILE))))
        except (_DamagedCheckpointError, FileNotFoundError) as error:
            logger.warning("checkpoint %s is damaged (%s): using the one before it", uri, error)
            continue
        return state
    return TrainState()


class _DamagedCheckpointError(Exception):
    """A checkpoint is not what was written; the message says which part."""


def _encode_state(state: Mapping[str, Any]) -> bytes:
    """Return the text of ``state.json``: the state, and the digest of its own text."""
    return json.dumps({**state, _STATE_DIGEST: compute_digest(json.dumps(state).encode())}).encode()


def _parse_state(content: bytes, name: str) -> tuple[TrainState, dict[str, str]]:
    """Return the content of ``state.json`` in the named checkpoint, and the digests of the other files."""
    try:
        fields = json.loads(content)
        digest = fields.pop(_STATE_DIGEST, None)  # earlier checkpoints have none
        if digest is not None and digest != compute_digest(json.dumps(fields).encode()):
            raise _DamagedCheckpointError(f"{_STATE_FILE} changed")
        digests: dict[str, str] = fields.pop("digests")
        state = TrainState(**fields)
        if _name_checkpoint(state.step) != name:
            raise _DamagedCheckpointError(f"{_STATE_FILE} is that of step {state.step}")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise _DamagedCheckpointError(f"{_STATE_FILE} cannot be read") from error
    return state, digests


def _name_checkpoint(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _write_tensors(uri: str, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, a remote file by way of a temporary local one; return the digest."""
    path = local_path(uri)
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
    """Yield the local paths of a folder's files, by name; remote files are copied while the block runs."""
    path = local_path(uri)
    if path is not None:
        yield {name: path / name for name in names}
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            with storage.open_input(join_uri(uri, name)) as source, Path(scratch, name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 24)
        yield {name: Path(scratch, name) for name in names}


def _read_tensors(path: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one, each a copy in memory; nothing where there is no file."""
    if path is not None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a mapping
                yield name, file.get_tensor(name).clone()


@torch.no_grad()
def _load_into(tensors: Mapping[str, Tensor], path: Path | None, uri: str) -> None:
    missing = set(tensors)
    for name, saved in _read_tensors(path):
        if name not in missing or saved.shape != tensors[name].shape:
            raise ValueError(f"checkpoint {uri} holds other weights than this model trains")
        tensors[name].copy_(saved)
        missing.remove(name)
    if missing:
        raise ValueError(f"checkpoint {uri} holds other weights than this model trains")
