"""Reading a checkpoint file without executing what it holds: safetensors, or PyTorch's own format by ``weights_only``."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_TRUSTED = (
    "where it came from a trusted place, keep its state_dict alone: load it there with the code that wrote it, and write the "
    "tensors with safetensors.torch.save_file"
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class _StandIn:
    """Takes the place of an object of the original training: nothing of the object's own class is looked up or run."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


# What Lightning writes beside the weights. Their values are not used here, so an inert object stands for each of them.
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, read from the disk when they are used, and the names of what stood beside them."""

    tensors: dict[str, Tensor]
    extras: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(value.shape) for name, value in self.tensors.items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a ``.ckpt`` (or ``.bin``, ``.pt``) or a ``.safetensors`` file, whichever its content is.

    The tensors are mapped, not loaded: a file of 7 GB takes no memory until its values are used. ValueError, in one sentence,
    where the file is missing, damaged, something else, or holds pickled objects that are not plain containers of tensors.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:2] == b"PK" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut short: its table of contents, at the end, is missing; fetch it again")
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise ValueError(f"{path} is no checkpoint: neither safetensors nor a file that torch.save wrote")
    return _read_torch(path, is_zip=head[:2] == b"PK")


def check_types(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise ValueError, naming a few of them, where tensors are not floating-point numbers; reads no values."""
    kinds = [f"{name} ({value.dtype})" for name, value in tensors.items() if value.dtype not in _FLOATS]
    if kinds:
        raise ValueError(
            f"{source} has weights that are not of float32, float16 or bfloat16: {name_some(kinds)}; a quantised copy "
            "cannot be imported"
        )


def check_values(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise ValueError, naming a few of them, where tensors hold NaN or infinity."""
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ValueError(f"{source} has weights that are NaN or infinite: {name_some(broken)}; fetch or train it again")


def name_some(names: list[str], most: int = 4) -> str:
    """Return the first few names, and how many there are in all."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more ({len(names)} in all)"


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        return Checkpoint(load_file(path), ())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: no whole safetensors file ({error}); fetch it again") from error


def _read_torch(path: Path, is_zip: bool) -> Checkpoint:
    try:
        with torch.serialization.safe_globals([(_StandIn, name) for name in _HARMLESS]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(
                f"{path} is damaged, or can be read only by executing what it holds; it was not read: {_TRUSTED}"
            ) from error
        raise ValueError(
            f"{path} holds a pickled {found[1]}, which reading it would execute; it was not read: {_TRUSTED}"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: PyTorch cannot read it; fetch it again") from error
    return _find_tensors(path, content)


def _find_tensors(path: Path, content: Any) -> Checkpoint:  # noqa: ANN401 - whatever a file holds
    """Return the state of a checkpoint: the file's content, or what it calls ``state_dict``."""
    extras: list[str] = []
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        extras += [str(name) for name in content if name != "state_dict"]
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not tensors by name")
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} is no checkpoint of tensors by name: it also holds {name_some(others)}")
    return Checkpoint({str(name): value.detach() for name, value in content.items()}, tuple(extras))
