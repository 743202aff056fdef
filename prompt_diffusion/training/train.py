"""Stage ``train``: from a recipe and sealed inputs to a sealed pipeline, with its losses and a grid of samples."""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from prompt_diffusion.building import builds_networks
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.engine.checkpoint import TrainState
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import OnEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.engine.ownership import own_stage
from prompt_diffusion.model.base import Base, load_base
from prompt_diffusion.model.controlnet import (
    PromptDiffusionControlNet,
    check_controlnet,
    load_controlnet,
    trained_unet_parameters,
)
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.model.references import PIPELINE_FOLDER, controlnet_folder
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, find_sealed
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder
from prompt_diffusion.store.uris import join_uri
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.loss import InContextObjective, check_recipe
from prompt_diffusion.training.preflight import check_base
from prompt_diffusion.training.samples import open_training_data
from prompt_diffusion.training.stage import Train
from prompt_diffusion.training.validation import InContextValidator


def run_train(
    stage: Train,
    store_root: str,
    resources: TrainResources,
    world: World,
    on_event: OnEvent | None = None,
) -> ManifestRef | None:
    """Train to the last step, resuming from the newest checkpoint, and seal; every process of the world calls it.

    Another run of the same training is waited for.
    Returns the sealed reference on the main process, None on the others. Seals ``pipeline/`` (diffusers' layout),
    ``losses.parquet`` (step, vision_task, loss, num_samples), ``config.json`` and ``grid.png`` (validation samples).
    """
    identity = stage.identity
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    with own_stage(identity.uri(store_root), world) as check_owner:
        sealed = find_sealed(identity, store_root)  # another run may have finished it while this one waited
        return sealed or _train(stage, store_root, resources, world, on_event, check_owner)


def _train(
    stage: Train,
    store_root: str,
    resources: TrainResources,
    world: World,
    on_event: OnEvent | None,
    check_owner: Callable[[], None],
) -> ManifestRef | None:
    config, inputs, identity = stage.config, stage.inputs, stage.identity
    base = load_base(config.base)
    check_recipe(config, base)
    check_base(config, base, inputs)
    if on_event is not None and world.is_main:
        on_event(world.describe_hardware())
    cache = ShardCache(resources.cache_dir, resources.cache_bytes)
    data, held_out = (open_training_data(config, inputs, cache, split) for split in ("train", "validation"))
    controlnet = build_controlnet(config, base)
    place_networks(base, controlnet, world.device, resources)
    parameters = select_parameters(config, base, controlnet)
    objective = InContextObjective(config, base, controlnet, data, world.device, resources.loader_threads)
    validation = InContextValidator(
        config, base, controlnet, held_out, world.device, identity.uri(store_root), on_event
    )
    try:
        state = run_loop(
            objective,
            parameters,
            LoopPlan(
                config.num_steps,
                config.batch_size,
                config.optimizer,
                join_uri(identity.uri(store_root), "checkpoints"),
                check_owner,
            ),
            resources,
            world,
            on_event,
            validation,
        )
    finally:
        objective.close()
        validation.close()
    if not world.is_main:
        return None
    grid = validation.render_grid(state.step)
    sampling, shown = config.sampling, next(iter(data.values())).rows.image(0, "input", None)
    pipeline = PromptDiffusionPipeline.from_parts(
        base, controlnet.eval(), sampling.num_inference_steps, sampling.guidance_scale, default_image_size=len(shown)
    ).to("cpu", memory_format=torch.contiguous_format)
    check_owner()
    return _seal_model(config, identity, store_root, pipeline, state, grid, world.size)


@builds_networks
def build_controlnet(config: TrainConfig, base: Base) -> PromptDiffusionControlNet:
    """Build the ControlNet of a recipe: from the base's encoder or the one that it names; what is new from the recipe's seed.

    ValueError, with both values, where the one that it names does not fit the base or the recipe.
    """
    example_pair = config.method == "prompt_diffusion"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.controlnet is None:
            controlnet: PromptDiffusionControlNet = PromptDiffusionControlNet.from_unet(
                base.unet, config.stem_channels, example_pair
            )
            return controlnet
        controlnet = load_controlnet(controlnet_folder(config.controlnet, config.base), example_pair)
    check_controlnet(controlnet, base.unet, config.stem_channels)
    return controlnet


def place_networks(
    base: Base, controlnet: PromptDiffusionControlNet, device: torch.device, resources: TrainResources
) -> None:
    """Move the networks to the device, in the layout and with the options that its resources say."""
    for part in (base.unet, base.text_encoder, base.vae, controlnet):
        part.to(device)
    if device.type == "cuda":  # tensor cores read channels last
        base.unet.to(memory_format=torch.channels_last)
        controlnet.to(memory_format=torch.channels_last)
    # on a CPU only the stems, wide and with few channels, are faster this way (by a fifth); the rest is faster without
    for stem in (controlnet.query_stem, controlnet.example_stem, controlnet.look_up):
        if stem is not None:
            stem.to(memory_format=torch.channels_last)
    for network in (base.unet, controlnet.trunk):
        if resources.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if resources.compile:
            network.compile()


def select_parameters(config: TrainConfig, base: Base, controlnet: PromptDiffusionControlNet) -> dict[str, Tensor]:
    """Return what is trained, by name, and make it require gradients: the ControlNet and, as published, the decoder."""
    controlnet.train().requires_grad_(True)
    parameters: dict[str, Tensor] = {f"controlnet.{name}": p for name, p in controlnet.named_parameters()}
    if config.train_decoder:
        parameters |= {f"unet.{name}": p for name, p in trained_unet_parameters(base.unet).items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def _seal_model(
    config: TrainConfig,
    identity: StageIdentity,
    store_root: str,
    pipeline: PromptDiffusionPipeline,
    state: TrainState,
    grid: bytes,
    num_processes: int,
) -> ManifestRef:
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        files = write_folder(identity, store_root, PIPELINE_FOLDER, Path(folder))
    contents: Mapping[str, bytes] = {
        "losses.parquet": _encode_losses(state),
        "config.json": json.dumps(config.model_dump(mode="json"), indent=2).encode(),
        "grid.png": grid,
    }
    files += [write_file(identity, store_root, path, data) for path, data in contents.items()]
    counts = {
        "steps": state.step,
        "samples": state.step * config.batch_size,
        "skipped_steps": state.num_skipped,
        "processes": num_processes,  # not part of the identity, though sums over other shares round differently
    }
    return seal_manifest(identity, store_root, files, counts=counts)


def _encode_losses(state: TrainState) -> bytes:
    columns = {"step": pa.int32(), "label": pa.string(), "loss": pa.float32(), "num_samples": pa.int32()}
    table = pa.Table.from_pylist(state.history, pa.schema(columns))
    table = table.rename_columns(["step", "vision_task", "loss", "num_samples"])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
