"""Stage ``train``: from a recipe and sealed inputs to a sealed pipeline, with its losses and a grid of samples."""

import io
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from prompt_diffusion.data.dataset import InContextData
from prompt_diffusion.data.records import read_latents
from prompt_diffusion.model.base import Base, load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, trained_unet_parameters
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.store.manifest import (
    ManifestRef,
    StoredFile,
    find_sealed,
    open_manifest,
    seal_manifest,
    write_file,
    write_folder,
)
from prompt_diffusion.store.storage import join_uri
from prompt_diffusion.training.checkpoint import Progress
from prompt_diffusion.training.config import TrainConfig, TrainResources
from prompt_diffusion.training.grid import render_validation_grid
from prompt_diffusion.training.loop import run_loop
from prompt_diffusion.training.loss import InContextObjective, check_recipe
from prompt_diffusion.training.plan import LoopPlan, OnStep
from prompt_diffusion.training.stage import PIPELINE_FOLDER, TrainInputs, identify_train
from prompt_diffusion.training.world import World

logger = logging.getLogger(__name__)


def run_train(
    config: TrainConfig,
    inputs: TrainInputs,
    store_root: str,
    resources: TrainResources,
    world: World,
    on_step: OnStep | None = None,
) -> ManifestRef | None:
    """Train to the last step, resuming from the newest checkpoint, and seal; every process of the world calls it.

    Returns the sealed reference on the main process, None on the others. Seals ``pipeline/`` (diffusers' layout),
    ``losses.parquet`` (step, vision_task, loss, num_samples), ``config.json`` and ``grid.png`` (validation samples).
    """
    identity = identify_train(config, inputs)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    base = load_base(config.base)
    check_recipe(config, base)
    maps = {condition: open_manifest(ref.uri) for condition, ref in inputs.maps.items()}
    pairs = open_manifest(inputs.pairs.uri)
    data, validation = InContextData(pairs, maps, "train"), InContextData(pairs, maps, "validation")
    controlnet = build_controlnet(config, base)
    place_networks(base, controlnet, world.device)
    objective = InContextObjective(config, base, controlnet, data, read_targets(inputs, data), world.device)
    progress = run_loop(
        objective,
        select_parameters(config, base, controlnet),
        LoopPlan(
            config.num_steps, config.batch_size, config.optimizer, join_uri(identity.uri(store_root), "checkpoints")
        ),
        resources,
        world,
        on_step,
    )
    if not world.is_main:
        return None
    controlnet.to(memory_format=torch.contiguous_format)
    pipeline = PromptDiffusionPipeline.from_parts(base, controlnet.eval()).to(world.device)
    grid = render_validation_grid(pipeline, validation, config)
    files = _write_model(config, inputs, store_root, pipeline.to("cpu"), progress, grid)
    return seal_manifest(
        identity,
        store_root,
        files,
        counts={
            "steps": progress.step,
            "samples": progress.step * config.batch_size,
            "skipped_steps": progress.num_skipped,
        },
    )


def build_controlnet(config: TrainConfig, base: Base) -> PromptDiffusionControlNet:
    """Build the ControlNet of a recipe: the trunk from the base's encoder, fresh stems from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        controlnet: PromptDiffusionControlNet = PromptDiffusionControlNet.from_unet(
            base.unet, config.stem_channels, example_pair=config.method == "prompt_diffusion"
        )
    return controlnet


def place_networks(base: Base, controlnet: PromptDiffusionControlNet, device: torch.device) -> None:
    """Move what a step computes with to the device, the stems in the layout that suits them."""
    for part in (base.unet, base.text_encoder, controlnet):
        part.to(device)
    # at the stems' sizes, wide and with few channels, this layout is a fifth faster on a CPU; the rest is faster without
    for stem in (controlnet.query_stem, controlnet.example_stem):
        if stem is not None:
            stem.to(memory_format=torch.channels_last)


def select_parameters(config: TrainConfig, base: Base, controlnet: PromptDiffusionControlNet) -> dict[str, Tensor]:
    """Return what is trained, by name, and make it require gradients: the ControlNet and, as published, the decoder."""
    controlnet.train().requires_grad_(True)
    parameters: dict[str, Tensor] = {f"controlnet.{name}": p for name, p in controlnet.named_parameters()}
    if config.train_decoder:
        parameters |= {f"unet.{name}": p for name, p in trained_unet_parameters(base.unet).items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def read_targets(inputs: TrainInputs, data: InContextData) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Return posterior mean and std of the split's rows, by target condition (None: the photograph)."""
    targets: dict[str | None, tuple[Tensor, Tensor]] = {}
    for target, ref in inputs.latents.items():
        mean, std = read_latents(open_manifest(ref.uri).read_table(), "edited")
        targets[None if target == "image" else target] = (
            torch.from_numpy(np.ascontiguousarray(mean[data.rows])),
            torch.from_numpy(np.ascontiguousarray(std[data.rows])),
        )
    return targets


def _write_model(
    config: TrainConfig,
    inputs: TrainInputs,
    store_root: str,
    pipeline: PromptDiffusionPipeline,
    progress: Progress,
    grid: bytes,
) -> list[StoredFile]:
    identity = identify_train(config, inputs)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        files = write_folder(identity, store_root, PIPELINE_FOLDER, Path(folder))
    contents: Mapping[str, bytes] = {
        "losses.parquet": _encode_losses(progress),
        "config.json": json.dumps(config.model_dump(mode="json"), indent=2).encode(),
        "grid.png": grid,
    }
    return files + [write_file(identity, store_root, path, data) for path, data in contents.items()]


def _encode_losses(progress: Progress) -> bytes:
    columns = {"step": pa.int32(), "label": pa.string(), "loss": pa.float32(), "num_samples": pa.int32()}
    table = pa.table(
        {name: pa.array([record[name] for record in progress.history], kind) for name, kind in columns.items()}
    ).rename_columns(["step", "vision_task", "loss", "num_samples"])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
