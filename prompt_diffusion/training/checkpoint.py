"""Checkpoints: safetensors and JSON, complete or absent, so that the same command goes on where it stopped.

A checkpoint is a folder ``checkpoints/step-00000500/`` whose ``state.json`` is written last and holds the digests of the
rest: without it, or with a digest that does not fit, the folder does not count.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from prompt_diffusion.store import storage
from prompt_diffusion.store.fingerprint import compute_digest

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
AVERAGES_FILE = "averages.safetensors"


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
    seconds: float = 0.0
    """Seconds of training so far, over all attempts (reported, never used)."""


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


def save_checkpoint(
    folder: str,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    progress: Progress,
    averages: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint below ``folder`` (a URI), then drop all but the newest two."""
    contents = {
        "weights.safetensors": parameters,
        "optimizer.safetensors": flatten_optimizers(optimizers),
        AVERAGES_FILE: averages,
    }
    files = {
        file: save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        for file, tensors in contents.items()
        if tensors
    }
    target = storage.join_uri(folder, f"step-{progress.step:08d}")
    for name, data in files.items():
        storage.write_bytes(storage.join_uri(target, name), data)
    state = {
        **asdict(progress),
        "digests": {name: compute_digest(data) for name, data in files.items()},
    }
    storage.write_bytes(storage.join_uri(target, "state.json"), json.dumps(state).encode())
    for step in list_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        storage.delete_folder(storage.join_uri(folder, step))


def list_checkpoints(folder: str) -> list[str]:
    """Return the names of the finished checkpoints below a folder, oldest first."""
    return sorted(name.split("/")[0] for name in storage.list_files(folder) if name.endswith("/state.json"))


def restore_checkpoint(
    folder: str, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], averages: Mapping[str, Tensor]
) -> Progress:
    """Load the newest whole checkpoint into what it was made of; a fresh ``Progress`` where there is none."""
    for name in reversed(list_checkpoints(folder)):
        uri = storage.join_uri(folder, name)
        state = json.loads(storage.read_bytes(storage.join_uri(uri, "state.json")))
        files = {file: storage.read_bytes(storage.join_uri(uri, file)) for file in state["digests"]}
        damaged = [file for file, digest in state["digests"].items() if compute_digest(files[file]) != digest]
        if damaged:
            logger.warning("checkpoint %s is damaged (%s): taking the one before", uri, ", ".join(damaged))
            continue
        _fill(parameters, load(files["weights.safetensors"]), uri)
        _fill(averages, load(files[AVERAGES_FILE]) if AVERAGES_FILE in files else {}, uri)
        restore_optimizers(optimizers, load(files["optimizer.safetensors"]))
        return Progress(**{name: value for name, value in state.items() if name != "digests"})
    return Progress()


def _fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], uri: str) -> None:
    if saved.keys() != tensors.keys():
        raise ValueError(f"checkpoint {uri} holds other weights than this model trains")
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(saved[key])
