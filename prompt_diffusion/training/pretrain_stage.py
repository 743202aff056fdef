"""Stages ``pretrain-autoencoder`` and ``pretrain``: the demo's base, sealed with its scores and its model card."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_diffusion.model.references import DEMO_BASE_FOLDER
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import (
    ManifestRef,
    find_sealed,
    open_manifest,
    seal_manifest,
    write_file,
    write_folder,
)
from prompt_diffusion.store.storage import join_uri
from prompt_diffusion.training.config import TrainResources
from prompt_diffusion.training.pretrain_config import PretrainConfig
from prompt_diffusion.training.pretrain_latents import (
    VAE_FOLDER,
    Maps,
    ScenePictures,
    list_inputs,
    load_autoencoder,
    open_pictures,
    read_latents,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from prompt_diffusion.model.base import Base

logger = logging.getLogger(__name__)

AUTOENCODER_VERSION, VERSION = 1, 2
BASE_FOLDER, _SCORES_FILE = "base", "scores.json"
_SCORED, _SCORED_ON_THE_WAY = 256, 16

OnEvent = Callable[[dict[str, Any]], None]


def identify_autoencoder(config: PretrainConfig, pairs: ManifestRef, maps: Maps) -> StageIdentity:
    """Return the identity of the autoencoder: its part of the configuration, image pairs and condition maps."""
    fields, inputs = config.list_autoencoder_fields(), list_inputs(pairs, maps)
    return StageIdentity(stage="pretrain-autoencoder", version=AUTOENCODER_VERSION, config=fields, inputs=inputs)


def run_autoencoder(
    config: PretrainConfig,
    pairs: ManifestRef,
    maps: Maps,
    store_root: str,
    resources: TrainResources,
    on_event: OnEvent | None = None,
) -> ManifestRef:
    """Train the autoencoder on the train split, in this process, resuming from checkpoints; score it on validation; seal it.

    Seals ``vae/`` (diffusers' layout, float32) and ``scores.json`` (PSNR and RMSE of each kind of picture).
    """
    identity = identify_autoencoder(config, pairs, maps)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    from prompt_diffusion.training.pretrain import train_autoencoder
    from prompt_diffusion.training.pretrain_objectives import Pictures
    from prompt_diffusion.training.pretrain_score import score_autoencoder, write_scores
    from prompt_diffusion.training.world import join_world

    shown = open_pictures(pairs, maps, "train", resources)
    held_out = open_pictures(pairs, maps, "validation", resources)

    def validate(vae: "AutoencoderKL") -> float:
        scores = score_autoencoder(vae, held_out.read, config.vae_shares, _SCORED_ON_THE_WAY)
        logger.info("restored, dB: %s", ", ".join(f"{kind} {score.psnr:.1f}" for kind, score in scores.items()))
        return float(np.mean([score.rmse for score in scores.values()]))

    with join_world("cpu", resources.threads_per_process) as world:
        pictures = Pictures(shown.read, shown.captions, config.vae_shares)
        checkpoints = join_uri(identity.uri(store_root), "checkpoints")
        vae = train_autoencoder(config, pictures, checkpoints, resources, world, on_event, validate)
        scores = score_autoencoder(vae, held_out.read, config.vae_shares, min(_SCORED, len(held_out.captions)))
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder, safe_serialization=True)
        files = write_folder(identity, store_root, VAE_FOLDER, Path(folder))
    files.append(write_file(identity, store_root, _SCORES_FILE, write_scores(scores)))
    return seal_manifest(identity, store_root, files, counts={"scenes": shown.data.num_rows})


def identify_pretrain(
    config: PretrainConfig, autoencoder: ManifestRef, latents: ManifestRef, pairs: ManifestRef, maps: Maps
) -> StageIdentity:
    """Return the identity of a base: its configuration, autoencoder, latents, image pairs and condition maps."""
    inputs = {"autoencoder": autoencoder.fingerprint, "latents": latents.fingerprint, **list_inputs(pairs, maps)}
    return StageIdentity(stage="pretrain", version=VERSION, config=config.model_dump(mode="json"), inputs=inputs)


def run_pretrain(
    config: PretrainConfig,
    autoencoder: ManifestRef,
    latents: ManifestRef,
    pairs: ManifestRef,
    maps: Maps,
    store_root: str,
    resources: TrainResources,
    on_event: OnEvent | None = None,
) -> ManifestRef:
    """Train UNet and text encoder on the train split, in this process, resuming from checkpoints; score; seal the base.

    Seals ``base/`` (diffusers' layout, float16, with a model card).
    """
    identity = identify_pretrain(config, autoencoder, latents, pairs, maps)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    from prompt_diffusion.training.pretrain import build_base, train_text_to_image
    from prompt_diffusion.training.pretrain_score import compute_denoising_loss
    from prompt_diffusion.training.world import join_world

    shown = open_pictures(pairs, maps, "train", resources)
    held_out = open_pictures(pairs, maps, "validation", resources)
    base = build_base(config, load_autoencoder(autoencoder), shown.captions)

    def validate() -> float:
        return compute_denoising_loss(base, config, held_out.read, held_out.captions, _SCORED)

    with join_world("cpu", resources.threads_per_process) as world:
        checkpoints = join_uri(identity.uri(store_root), "checkpoints")
        found = read_latents(latents, config.unet_shares)
        train_text_to_image(config, base, found, shown.captions, checkpoints, resources, world, on_event, validate)
        with tempfile.TemporaryDirectory() as folder:
            _describe_base(base, config, autoencoder, shown, held_out, config.unet_steps, Path(folder))
            files = write_folder(identity, store_root, BASE_FOLDER, Path(folder))
    files.append(write_file(identity, store_root, "config.json", config.model_dump_json(indent=2).encode()))
    return seal_manifest(identity, store_root, files, counts={"scenes": shown.data.num_rows})


def export_progress(
    config: PretrainConfig,
    autoencoder: ManifestRef,
    latents: ManifestRef,
    pairs: ManifestRef,
    maps: Maps,
    store_root: str,
    resources: TrainResources,
    folder: Path,
) -> int:
    """Write the base as it stands at its newest checkpoint, as it would be shipped, and return that step.

    What the recipe averages is averaged. ValueError where there is no checkpoint.
    """
    import torch

    from prompt_diffusion.training.checkpoint import restore_checkpoint
    from prompt_diffusion.training.pretrain import build_base, name_parameters

    shown = open_pictures(pairs, maps, "train", resources)
    base = build_base(config, load_autoencoder(autoencoder), shown.captions)
    parameters = name_parameters(base)
    averages = {} if config.unet_optimizer.ema_decay is None else {n: p.detach().clone() for n, p in parameters.items()}
    identity = identify_pretrain(config, autoencoder, latents, pairs, maps)
    checkpoints = join_uri(identity.uri(store_root), "checkpoints")
    progress = restore_checkpoint(checkpoints, parameters, [], averages)
    if progress.step == 0:
        raise ValueError(f"{checkpoints} has no checkpoint yet")
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    base.unet.eval()
    base.text_encoder.eval()
    held_out = open_pictures(pairs, maps, "validation", resources)
    _describe_base(base, config, autoencoder, shown, held_out, progress.step, folder)
    return progress.step


def _describe_base(
    base: "Base",
    config: PretrainConfig,
    autoencoder: ManifestRef,
    shown: ScenePictures,
    held_out: ScenePictures,
    step: int,
    folder: Path,
) -> None:
    """Score a base and write it with its model card."""
    from prompt_diffusion.training.pretrain_score import compute_denoising_loss, read_scores, write_base

    num_scored = min(_SCORED, len(held_out.captions))
    loss = compute_denoising_loss(base, config, held_out.read, held_out.captions, num_scored)
    scores = read_scores(open_manifest(autoencoder.uri).read_file(_SCORES_FILE))
    write_base(base, config, folder, scores, loss, step, shown.data.num_rows, num_scored)


def install_base(model: ManifestRef, folder: Path = DEMO_BASE_FOLDER) -> Path:
    """Copy a sealed base to where ``demo-base`` is looked up in this checkout; return that folder."""
    with tempfile.TemporaryDirectory() as cache:
        source = open_manifest(model.uri).fetch_folder(BASE_FOLDER, Path(cache))
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder
