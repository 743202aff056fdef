"""Stages ``pretrain-autoencoder`` and ``pretrain``: the demo's base, sealed with its scores and its model card."""

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.model.references import DEMO_BASE_FOLDER
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.latents import (
    VAE_FOLDER,
    ScenePictures,
    list_picture_inputs,
    load_autoencoder,
    open_pictures,
    read_latents,
)
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, find_sealed, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.store.uris import join_uri

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from prompt_diffusion.engine.distributed import World
    from prompt_diffusion.model.base import Base

logger = logging.getLogger(__name__)

AUTOENCODER_VERSION = 1
VERSION = 3
BASE_FOLDER, _SCORES_FILE = "base", "scores.json"
_SCORED, _SCORED_ON_THE_WAY = 256, 16


@dataclass(frozen=True)
class _OwnedTraining(Stage[TrainResources], ABC):
    """A stage that trains in this process, one run of it at a time."""

    def run(self, context: Context[TrainResources]) -> ManifestRef:
        """Train, score, and seal; the context hears every event, and another run of the same stage is waited for."""
        from prompt_diffusion.engine.distributed import join_world
        from prompt_diffusion.engine.ownership import own_stage

        with (
            join_world("cpu", context.resources.threads_per_process, is_alone=True) as world,
            own_stage(self.identity.uri(context.store), world) as check_owner,
        ):
            sealed = find_sealed(self.identity, context.store)  # another run may have ended it while this one waited
            return sealed or self._make(context, world, check_owner)

    @abstractmethod
    def _make(self, context: Context[TrainResources], world: "World", check_owner: Callable[[], None]) -> ManifestRef:
        """Train, score, and seal; ``check_owner`` raises where another run has taken over."""


@dataclass(frozen=True)
class PretrainAutoencoder(_OwnedTraining):
    """The stage: ``vae/`` (diffusers' layout, float32) and ``scores.json`` (PSNR and RMSE of each kind of picture).

    It is trained on the train split, in this process, resumes from checkpoints, and is scored on the validation split.
    """

    config: PretrainConfig
    dataset: Dataset

    @property
    def title(self) -> str:
        """What people call it."""
        return "pretrain autoencoder"

    def identify(self) -> StageIdentity:
        """Return the autoencoder's part of the configuration, image pairs and every condition map."""
        return StageIdentity(
            stage="pretrain-autoencoder",
            version=AUTOENCODER_VERSION,
            config=self.config.list_autoencoder_fields(),
            inputs=list_picture_inputs(self.dataset, self.config.vae_shares),
        )

    def _make(self, context: Context[TrainResources], world: "World", check_owner: Callable[[], None]) -> ManifestRef:
        from prompt_diffusion.pretraining.objectives import Pictures
        from prompt_diffusion.pretraining.score import score_autoencoder, write_scores
        from prompt_diffusion.pretraining.train import train_autoencoder

        identity, store, resources = self.identity, context.store, context.resources
        shares = self.config.vae_shares
        shown = open_pictures(self.dataset, "train", resources)
        held_out = open_pictures(self.dataset, "validation", resources)

        def validate(vae: "AutoencoderKL") -> float:
            scores = score_autoencoder(vae, held_out.read, shares, _SCORED_ON_THE_WAY)
            logger.info("restored, dB: %s", ", ".join(f"{kind} {score.psnr:.1f}" for kind, score in scores.items()))
            return float(np.mean([score.rmse for score in scores.values()]))

        vae = train_autoencoder(
            self.config,
            Pictures(shown.read, shown.captions, shares),
            join_uri(identity.uri(store), "checkpoints"),
            resources,
            world,
            context.report,
            validate,
            check_owner,
        )
        scores = score_autoencoder(vae, held_out.read, shares, min(_SCORED, len(held_out.captions)))
        check_owner()
        with tempfile.TemporaryDirectory() as folder:
            vae.save_pretrained(folder, safe_serialization=True)
            files = write_folder(identity, store, VAE_FOLDER, Path(folder))
        files.append(write_file(identity, store, _SCORES_FILE, write_scores(scores)))
        return seal_manifest(identity, store, files, counts={"scenes": shown.data.num_rows})


@dataclass(frozen=True)
class Pretrain(_OwnedTraining):
    """The stage: a base in ``base/`` (diffusers' layout, float16, with a model card) around a sealed autoencoder.

    UNet and text encoder are trained on the train split, in this process, resume from checkpoints, and are scored on the
    validation split.
    """

    config: PretrainConfig
    autoencoder: ManifestRef
    latents: ManifestRef
    dataset: Dataset

    @property
    def title(self) -> str:
        """What people call it."""
        return "pretrain base"

    def identify(self) -> StageIdentity:
        """Return architecture and recipe, autoencoder, latents, image pairs and every condition map."""
        made = (StageInput.of("autoencoder", self.autoencoder), StageInput.of("latents", self.latents))
        return StageIdentity(
            stage="pretrain",
            version=VERSION,
            config=self.config.model_dump(mode="json"),
            inputs=(*made, *list_picture_inputs(self.dataset, self.config.unet_shares)),
        )

    def checkpoints(self, store: str) -> str:
        """Return the URI of the checkpoint folder."""
        return join_uri(self.identity.uri(store), "checkpoints")

    def _make(self, context: Context[TrainResources], world: "World", check_owner: Callable[[], None]) -> ManifestRef:
        from prompt_diffusion.pretraining.score import compute_denoising_loss
        from prompt_diffusion.pretraining.train import build_base, train_text_to_image

        identity, store, config, resources = self.identity, context.store, self.config, context.resources
        shown = open_pictures(self.dataset, "train", resources)
        held_out = open_pictures(self.dataset, "validation", resources)
        base = build_base(config, load_autoencoder(self.autoencoder), shown.captions)

        def validate() -> float:
            return compute_denoising_loss(base, config, held_out.read, held_out.captions, _SCORED)

        train_text_to_image(
            config,
            base,
            read_latents(self.latents, config.unet_shares),
            shown.captions,
            self.checkpoints(store),
            resources,
            world,
            context.report,
            validate,
            check_owner,
        )
        with tempfile.TemporaryDirectory() as folder:
            _describe_base(self, base, shown, held_out, config.unet_steps, Path(folder))
            check_owner()
            files = write_folder(identity, store, BASE_FOLDER, Path(folder))
        files.append(write_file(identity, store, "config.json", config.model_dump_json(indent=2).encode()))
        return seal_manifest(identity, store, files, counts={"scenes": shown.data.num_rows})


def export_progress(stage: Pretrain, context: Context[TrainResources], folder: Path) -> int:
    """Write the base as it stands at its newest checkpoint, as it would be shipped, and return that step.

    Of a recipe that keeps an EMA, it is the EMA's weights. ValueError where there is no checkpoint.
    """
    import torch

    from prompt_diffusion.engine.checkpoint import restore_checkpoint
    from prompt_diffusion.pretraining.train import build_base, name_parameters

    config, checkpoints = stage.config, stage.checkpoints(context.store)
    shown = open_pictures(stage.dataset, "train", context.resources)
    base = build_base(config, load_autoencoder(stage.autoencoder), shown.captions)
    parameters = name_parameters(base)
    ema = {} if config.unet_optimizer.ema_decay is None else {n: p.detach().clone() for n, p in parameters.items()}
    step = restore_checkpoint(checkpoints, parameters, [], ema).step
    if step == 0:
        raise ValueError(f"{checkpoints} has no checkpoint yet")
    with torch.no_grad():
        for name, average in ema.items():
            parameters[name].copy_(average)
    base.unet.eval()
    base.text_encoder.eval()
    held_out = open_pictures(stage.dataset, "validation", context.resources)
    _describe_base(stage, base, shown, held_out, step, folder)
    return step


def _describe_base(
    stage: Pretrain, base: "Base", shown: ScenePictures, held_out: ScenePictures, step: int, folder: Path
) -> None:
    """Score a base and write it with its model card."""
    from prompt_diffusion.pretraining.score import compute_denoising_loss, read_scores, write_base

    num_scored = min(_SCORED, len(held_out.captions))
    loss = compute_denoising_loss(base, stage.config, held_out.read, held_out.captions, num_scored)
    scores = read_scores(open_manifest(stage.autoencoder.uri).read_file(_SCORES_FILE))
    write_base(base, stage.config, folder, scores, loss, step, shown.data.num_rows, num_scored)


def install_base(model: ManifestRef, folder: Path = DEMO_BASE_FOLDER) -> Path:
    """Copy a sealed base to where ``demo-base`` is looked up in this checkout; return that folder."""
    with tempfile.TemporaryDirectory() as cache:
        source = open_manifest(model.uri).fetch_folder(BASE_FOLDER, Path(cache))
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder
