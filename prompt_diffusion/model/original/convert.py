"""Import of a checkpoint in the original layout: the paper's released weights, or SD v1.5's own as a base."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPTokenizer

from prompt_diffusion.model.original.configurations import text_config, unet_config, vae_config, vae_stride
from prompt_diffusion.model.original.infer import infer_layout
from prompt_diffusion.model.original.layout import (
    AVERAGES,
    BUFFERS,
    NUM_STEM_STAGES,
    PUBLISHED_HEADS,
    SCALING_FACTOR,
    UNET,
    OriginalLayout,
    average_key,
    is_kernel_of_a_matrix,
    list_keys,
    unet_keys,
)
from prompt_diffusion.model.original.names import map_names
from prompt_diffusion.model.original.parts import (
    BASE_IMAGE_SIZE,
    CHECKING,
    DIGESTING,
    RELEASED_IMAGE_SIZE,
    WRITING,
    ImportReport,
    OnPhase,
    build_networks,
    check_free,
    count_parts,
    describe_keys,
    fill_network,
    new_folder,
    tell_nobody,
    write_model,
)
from prompt_diffusion.model.original.read import check_types, check_values, read_checkpoint
from prompt_diffusion.model.original.schedule import read_scheduler
from prompt_diffusion.model.original.tokenizer import fit_tokenizer
from prompt_diffusion.store.digest import digest_file

_AVERAGE_NOTES = (f"{AVERAGES}decay", f"{AVERAGES}num_updates")


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A checkpoint whose every tensor is accounted for by name; the values are still on the disk."""

    path: Path
    layout: OriginalLayout
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    """Moving averages of the UNet, by their own names; empty where there are none."""
    buffers: dict[str, Tensor]
    extras: tuple[str, ...]
    """Names of what stands beside the tensors."""

    @property
    def kind(self) -> str:
        """``prompt_diffusion``, or ``base`` where there is no control model."""
        return "base" if self.layout.stem_channels is None else "prompt_diffusion"


def open_original(
    path: Path, num_heads: int = PUBLISHED_HEADS, num_text_heads: int | None = None
) -> OriginalCheckpoint:
    """Open a checkpoint file of the original layout and say where each of its tensors belongs; reads no values.

    ``num_heads`` and ``num_text_heads`` are what no checkpoint states, see ``infer_layout``. ValueError, in one sentence, for a
    file that is damaged or of another layout, and for tensors that are missing or unused.
    """
    checkpoint = read_checkpoint(path)
    try:
        layout = infer_layout(checkpoint.shapes, num_heads, num_text_heads)
        _check_strides(layout)
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    weights, averages = account_for(checkpoint.tensors, layout, path)
    check_types(weights | averages, path)
    buffers = {name: checkpoint.tensors[name] for name in (*BUFFERS, *_AVERAGE_NOTES) if name in checkpoint.tensors}
    return OriginalCheckpoint(path, layout, weights, averages, buffers, checkpoint.extras)


def import_checkpoint(
    original: OriginalCheckpoint,
    out: Path,
    tokenizer: CLIPTokenizer,
    *,
    image_size: int | None = None,
    take_averages: bool = False,
    on_phase: OnPhase = tell_nobody,
) -> ImportReport:
    """Write a checkpoint as a folder in diffusers' layout: a pipeline, or a base where it has no control model.

    Weights keep their precision and every bit. Conditions are images in [-1, 1], as the original code was trained.
    ``image_size`` None takes the published 256 pixels for a pipeline and 512 for a base; ``take_averages`` takes the moving
    averages of a base's UNet where the file holds both.

    Raises:
        ValueError: In one sentence, tensors of a wrong shape, NaN or infinite, another model's tokenizer, or an ``out`` that is
            taken. Nothing is left behind then.
    """
    check_free(out)
    path, layout, buffers = original.path, original.layout, original.buffers
    fitted = fit_tokenizer(tokenizer, layout.text.vocabulary_size, layout.text.num_positions)
    try:
        scheduler = read_scheduler(buffers)
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    weights = original.weights | (_averaged_unet(original) if take_averages else {})
    size = image_size or (BASE_IMAGE_SIZE if layout.stem_channels is None else RELEASED_IMAGE_SIZE)
    scaling = float(f"{float(buffers['scale_factor']):.6g}") if "scale_factor" in buffers else SCALING_FACTOR
    networks = convert_networks(weights, layout, size, scaling, path)
    on_phase(CHECKING)
    check_values(weights, path)
    on_phase(DIGESTING)
    report = ImportReport(
        kind=original.kind,
        source=path.name,
        sha256=digest_file(path),
        image_size=size,
        parts=count_parts(networks),
        architecture=asdict(layout),
        buffers=tuple(buffers),
        left_out=_list_left_out(original, take_averages),
    )
    on_phase(WRITING)
    with new_folder(out) as folder:
        write_model(folder, networks, fitted, scheduler)
    return report


def convert_networks(
    tensors: Mapping[str, Tensor], layout: OriginalLayout, image_size: int, scaling_factor: float, source: object
) -> dict[str, Any]:
    """Return a checkpoint's networks as diffusers has them, by part; they share the memory of the tensors.

    ``tensors`` are the weights by original names, ``source`` is what errors call it. ValueError names tensors whose shapes are
    not those of the layout.
    """
    configs = unet_config(layout, image_size), vae_config(layout, image_size, scaling_factor), text_config(layout.text)
    networks = build_networks(*configs, layout.stem_channels)
    for part, names in map_names(layout).items():
        fill_network(networks[part], rename_tensors(tensors, names), names, source)
    return networks


def account_for(
    found: Mapping[str, Tensor], layout: OriginalLayout, source: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights by their original names, and the UNet's moving averages where there are any.

    ValueError names tensors that are missing, and those that are neither weights nor known buffers.
    """
    keys = list_keys(layout)
    averages = [average_key(UNET + key) for key in unet_keys(layout.unet)]
    has_averages = any(key in found for key in averages)
    expected = [*keys, *(averages if has_averages else [])]
    missing = [key for key in expected if key not in found]
    unused = sorted(set(found) - set(expected) - set(BUFFERS) - set(_AVERAGE_NOTES))
    if missing or unused:
        raise ValueError(f"{source} {describe_keys(missing, unused)}")
    return {key: found[key] for key in keys}, {key: found[key] for key in averages if has_averages}


def rename_tensors(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return one part's tensors by diffusers' names: views of the original ones, bit for bit."""
    return {
        ours: tensors[key].flatten(1)
        if is_kernel_of_a_matrix(key) and tensors[key].shape[2:] == (1, 1)
        else tensors[key]
        for ours, key in names.items()
    }


def _averaged_unet(original: OriginalCheckpoint) -> dict[str, Tensor]:
    if not original.averages:
        raise ValueError(f"{original.path} holds no moving averages (model_ema.*): import it without --averages")
    keys = [UNET + key for key in unet_keys(original.layout.unet)]
    return {key: original.averages[average_key(key)] for key in keys}


def _check_strides(layout: OriginalLayout) -> None:
    if layout.stem_channels is not None and vae_stride(layout.vae) != 2 ** (NUM_STEM_STAGES - 1):
        raise ValueError(
            f"its latents are {vae_stride(layout.vae)} times smaller than images, but its stems' features are "
            f"{2 ** (NUM_STEM_STAGES - 1)} times smaller"
        )


def _list_left_out(original: OriginalCheckpoint, take_averages: bool) -> tuple[str, ...]:
    extras = [f"{name} (beside the weights)" for name in original.extras]
    if original.averages:
        extras.append(f"{UNET}* (not averaged)" if take_averages else f"{AVERAGES}* (moving averages of the UNet)")
    return tuple(extras)
