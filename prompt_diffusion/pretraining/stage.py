"""Stage ``pretrain``: the demo's base from image pairs and their maps, sealed with its scores and its model card."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.dataset import Dataset, InContextData, Side
from prompt_diffusion.data.records import Split
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import Event
from prompt_diffusion.model.references import DEMO_BASE_FOLDER
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import (
    ManifestRef,
    find_sealed,
    open_manifest,
    seal_manifest,
    write_file,
    write_folder,
)
from prompt_diffusion.store.records import Progress
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.store.storage import join_uri

if TYPE_CHECKING:
    from prompt_diffusion.engine.distributed import World
    from prompt_diffusion.model.base import Base

VERSION = 2
BASE_FOLDER = "base"
_SCORED_IMAGES = 256
_CARD = """---
license: apache-2.0
library_name: diffusers
---
# The demo's base model

To `make demo` it is what Stable Diffusion v1.5 is to the paper: a latent text-to-image diffusion model of diffusers' own
classes, here with {parameters:.1f} million parameters, for {size} x {size} pixels. It knows ray-cast scenes of coloured
primitives and nothing else, and is of no use for other pictures.

**Made by** the flow `pretrain/demo-base` of this repository, from scratch, on {scenes} scene pairs of world 1000 (the demo's
own scenes are of world 0: it has seen none of them) and their depth, edge, segmentation and normal maps: the autoencoder in
{vae_steps} steps of {vae_batch}, then UNet and text encoder together in {unet_steps} steps of {unet_batch}, on CPU. Maps carry
no text. v-prediction, SD's betas rescaled to zero terminal SNR. Weights are stored in float16.

**Scores** on {held_out} held-out pictures of each kind: the autoencoder restores them at {psnr}; the denoising loss on
photographs with their captions is {loss:.4f}.

The complete configuration is in `pretrain.json`.
"""


@dataclass(frozen=True)
class PretrainProgress(Progress):
    """What one phase of the pre-training reported."""

    phase: str
    """``vae`` or ``unet``."""
    event: Event


@dataclass(frozen=True)
class Pretrain(Stage[TrainResources]):
    """The stage: a base in ``base/`` (diffusers' layout, float16, with a model card), trained on the train split.

    It is trained in this process, resumes from checkpoints, and is scored on the validation split.
    """

    config: PretrainConfig
    dataset: Dataset

    @property
    def title(self) -> str:
        """What people call it."""
        return "pretrain base"

    def identify(self) -> StageIdentity:
        """Return architecture and recipe, image pairs and every condition map."""
        inputs = self.dataset.list_inputs(sorted(self.dataset.maps))
        config = self.config.model_dump(mode="json")
        return StageIdentity(stage="pretrain", version=VERSION, config=config, inputs=inputs)

    def run(self, context: Context[TrainResources]) -> ManifestRef:
        """Train, score, and seal; another run of the same pre-training is waited for."""
        from prompt_diffusion.engine.distributed import join_world
        from prompt_diffusion.engine.ownership import own_stage

        with (
            join_world("cpu", context.resources.threads_per_process, is_alone=True) as world,
            own_stage(self.identity.uri(context.store), world) as check_owner,
        ):
            sealed = find_sealed(self.identity, context.store)  # another run may have ended it while this one waited
            return sealed or self._make(context, world, check_owner)

    def _make(self, context: Context[TrainResources], world: "World", check_owner: Callable[[], None]) -> ManifestRef:
        from prompt_diffusion.pretraining.train import pretrain_base

        identity, store, config = self.identity, context.store, self.config
        by_kind, captions = read_pictures(self.dataset, "train")
        base = pretrain_base(
            config,
            by_kind,
            captions,
            lambda phase: join_uri(identity.uri(store), "checkpoints", phase),
            context.resources,
            world,
            lambda phase: lambda event: context.report(PretrainProgress(phase, event)),
            check_owner,
        )
        check_owner()
        held_out, texts = read_pictures(self.dataset, "validation")
        scored = {kind: images[:_SCORED_IMAGES] for kind, images in held_out.items()}
        with tempfile.TemporaryDirectory() as folder:
            write_base(base, config, Path(folder), scored, texts, len(captions) // 2)
            files = write_folder(identity, store, BASE_FOLDER, Path(folder))
        files.append(write_file(identity, store, "config.json", config.model_dump_json(indent=2).encode()))
        return seal_manifest(identity, store, files, counts={"scenes": len(captions) // 2})


def write_base(
    base: "Base",
    config: PretrainConfig,
    folder: Path,
    held_out: Mapping[str, NDArray[np.uint8]],
    captions: list[str],
    num_scenes: int,
) -> None:
    """Write a base as it is shipped: float16 safetensors, its configuration, and a model card with measured scores."""
    import torch

    from prompt_diffusion.pretraining.train import compute_denoising_loss, compute_psnr

    psnr = {kind: compute_psnr(base.vae, images) for kind, images in held_out.items()}
    loss = compute_denoising_loss(base, config, held_out["image"], captions)
    base.save(folder, dtype=torch.float16)
    parameters = sum(p.numel() for part in (base.vae, base.unet, base.text_encoder) for p in part.parameters())
    card = _CARD.format(
        parameters=parameters / 1e6,
        size=config.image_size,
        scenes=num_scenes,
        vae_steps=config.vae_steps,
        vae_batch=config.vae_batch_size,
        unet_steps=config.unet_steps,
        unet_batch=config.unet_batch_size,
        held_out=len(held_out["image"]),
        psnr=", ".join(f"{value:.1f} dB ({kind})" for kind, value in psnr.items()),
        loss=loss,
    )
    (folder / "README.md").write_text(card)
    (folder / "pretrain.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def read_pictures(dataset: Dataset, split: Split) -> tuple[dict[str, NDArray[np.uint8]], list[str]]:
    """Return every picture of a split by kind (N, H, W, 3: each pair's input, then its edited twin) and the captions."""
    maps = {name: open_manifest(ref.uri) for name, ref in dataset.maps.items()}
    data = InContextData(open_manifest(dataset.pairs.uri), maps, split)
    sides: tuple[Side, Side] = ("input", "edited")
    order = [(row, side) for row in range(data.num_rows) for side in sides]
    kinds: dict[str, str | None] = {"image": None, **{name: name for name in maps}}
    by_kind = {kind: np.stack([data.image(row, side, name) for row, side in order]) for kind, name in kinds.items()}
    return by_kind, [data.captions(side)[row] for row, side in order]


def install_base(model: ManifestRef, folder: Path = DEMO_BASE_FOLDER) -> Path:
    """Copy a sealed base to where ``demo-base`` is looked up in this checkout; return that folder."""
    with tempfile.TemporaryDirectory() as cache:
        source = open_manifest(model.uri).fetch_folder(BASE_FOLDER, Path(cache))
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder
