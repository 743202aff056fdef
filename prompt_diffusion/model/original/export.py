"""Export to the original layout: the exact inverse of the import."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prompt_diffusion.model.original.configurations import layout_of
from prompt_diffusion.model.original.folders import read_config, read_weights
from prompt_diffusion.model.original.layout import POSITIONS, SCALING_FACTOR, is_kernel_of_a_matrix
from prompt_diffusion.model.original.names import map_names
from prompt_diffusion.model.original.parts import CHECKING, DIGESTING, WRITING, OnPhase, describe_keys, tell_nobody
from prompt_diffusion.model.original.read import check_types, check_values
from prompt_diffusion.model.original.schedule import compute_buffers
from prompt_diffusion.store.digest import digest_file

_OUR_CLASS = "PromptDiffusionControlNet"
_FORMATS = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    kind: str
    """``prompt_diffusion`` or ``base``."""
    file: str
    """The file that was written."""
    sha256: str
    """Its digest."""
    weights: int
    """Number of weight tensors."""
    buffers: tuple[str, ...]
    """Tensors that are not weights: the original code keeps them in its files and asks for them when it loads one."""
    architecture: dict[str, Any]
    """What the original configuration file must say; no file of weights holds the numbers of heads."""


def export_checkpoint(folder: Path, out: Path, on_phase: OnPhase = tell_nobody) -> ExportReport:
    """Write a pipeline of ours, or a base, as one file in the original layout; every weight keeps its bits.

    ``out`` ends in ``.safetensors`` or ``.ckpt`` (PyTorch's format, the tensors under ``state_dict`` as Lightning keeps them).

    Raises:
        ValueError: In one sentence, an architecture that the original layout cannot express, tensors that are missing, unused,
            NaN or infinite, or an ``out`` that is taken. Nothing is left behind then.
    """
    if out.suffix not in _FORMATS:
        raise ValueError(f"{out} must end in {' or '.join(_FORMATS)}: that says how it is written")
    if out.exists():
        raise ValueError(f"{out} is already there: name another file with --out, or remove it")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    configs = {part: read_config(folder / part) for part in ("unet", "vae", "text_encoder", "scheduler")}
    stem_channels = _find_stems(folder)
    layout = layout_of(configs["unet"], configs["vae"], configs["text_encoder"], configs["scheduler"], stem_channels)
    on_phase(CHECKING)
    weights: dict[str, Tensor] = {}
    for part, names in map_names(layout).items():
        tensors = read_weights(folder / part)
        missing, unused = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
        if missing or unused:
            raise ValueError(f"{folder / part} {describe_keys(missing, unused)}")
        check_types(tensors, folder / part)
        check_values(tensors, folder / part)
        weights |= {key: _as_original(key, tensors[ours]) for ours, key in names.items()}
    buffers = _compute_buffers(configs, layout.text.num_positions)
    on_phase(WRITING)
    _write(weights | buffers, out)
    on_phase(DIGESTING)
    return ExportReport(
        kind="base" if stem_channels is None else "prompt_diffusion",
        file=str(out),
        sha256=digest_file(out),
        weights=len(weights),
        buffers=tuple(buffers),
        architecture=asdict(layout),
    )


def _find_stems(folder: Path) -> tuple[int, ...] | None:
    """Return the stems' channels, None for a base; ValueError for a control model that the original layout cannot hold."""
    if not (folder / "controlnet").is_dir():
        return None
    config = read_config(folder / "controlnet")
    if config.get("_class_name") != _OUR_CLASS:
        raise ValueError(
            f"{folder / 'controlnet'} holds {config.get('_class_name')!r}: only models of this project are exported "
            "(import-checkpoint takes diffusers' port of Prompt Diffusion)"
        )
    if not config.get("example_pair", True):
        raise ValueError("the original layout cannot express a model without an example stem (a CN(FT) baseline)")
    if config.get("look_up_config"):
        raise ValueError("the original layout cannot express a look-up: its code reads the pair by a stem alone")
    if config.get("unit_query"):
        raise ValueError(
            "the original layout cannot express a query stem that reads images in [0, 1] (one that began as a public "
            "ControlNet): its code feeds both stems images in [-1, 1]"
        )
    return tuple(config["stem_channels"])


def _as_original(key: str, value: Tensor) -> Tensor:
    return value[:, :, None, None] if is_kernel_of_a_matrix(key) and value.ndim == 2 else value


def _compute_buffers(configs: Mapping[str, Mapping[str, Any]], num_positions: int) -> dict[str, Tensor]:
    buffers = compute_buffers(configs["scheduler"]) | {POSITIONS: torch.arange(num_positions)[None]}
    scaling = float(configs["vae"].get("scaling_factor", SCALING_FACTOR))
    # the published one stands in the original configuration file, and its code knows the buffer only for others
    return buffers if scaling == SCALING_FACTOR else buffers | {"scale_factor": torch.tensor(scaling)}


def _write(tensors: dict[str, Tensor], out: Path) -> None:
    """Write a file that gets its name when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}-")
    os.close(handle)
    place = Path(name)
    try:
        if out.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in tensors.items()}, place, metadata={"format": "pt"})
        else:
            torch.save({"state_dict": tensors}, place)
        place.chmod(0o644)
        place.replace(out)
    except (SafetensorError, RuntimeError) as error:  # how the writers report a full disk
        raise OSError(f"{out} could not be written, is the disk full? ({str(error).splitlines()[0]})") from error
    finally:
        place.unlink(missing_ok=True)
