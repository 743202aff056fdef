"""Stage ``pretrain``: the demo's base from image pairs and their maps, sealed with its scores and its model card."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.dataset import InContextData, Side
from prompt_diffusion.data.records import Split
from prompt_diffusion.engine.config import TrainResources
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
from prompt_diffusion.store.storage import join_uri

if TYPE_CHECKING:
    from prompt_diffusion.engine.distributed import World
    from prompt_diffusion.model.base import Base

VERSION = 1
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


def identify_pretrain(config: PretrainConfig, pairs: ManifestRef, maps: Mapping[str, ManifestRef]) -> StageIdentity:
    """Return the identity of a base: its configuration, image pairs and condition maps."""
    return StageIdentity(
        stage="pretrain",
        version=VERSION,
        config=config.model_dump(mode="json"),
        inputs={"pairs": pairs.fingerprint, **{f"maps/{name}": ref.fingerprint for name, ref in sorted(maps.items())}},
    )


def run_pretrain(
    config: PretrainConfig,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
    store_root: str,
    resources: TrainResources,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> ManifestRef:
    """Train the base on the train split, in this process, resuming from checkpoints; score it on validation; seal it.

    Another run of the same pre-training is waited for.
    Seals ``base/`` (diffusers' layout, float16, with a model card). ``on_event`` hears the phase, ``vae`` or ``unet``, and
    what ``run_loop`` reports.
    """
    identity = identify_pretrain(config, pairs, maps)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    from prompt_diffusion.engine.distributed import join_world
    from prompt_diffusion.engine.ownership import own_stage

    with (
        join_world("cpu", resources.threads_per_process, is_alone=True) as world,
        own_stage(identity.uri(store_root), world) as check_owner,
    ):
        sealed = find_sealed(identity, store_root)  # another run may have ended it while this one waited
        return sealed or _pretrain(config, pairs, maps, store_root, resources, on_event, world, check_owner)


def _pretrain(
    config: PretrainConfig,
    pairs: ManifestRef,
    maps: Mapping[str, ManifestRef],
    store_root: str,
    resources: TrainResources,
    on_event: Callable[[str, dict[str, Any]], None] | None,
    world: "World",
    check_owner: Callable[[], None],
) -> ManifestRef:
    from prompt_diffusion.pretraining.train import pretrain_base

    identity = identify_pretrain(config, pairs, maps)
    by_kind, captions = read_pictures(pairs, maps, "train")
    base = pretrain_base(
        config,
        by_kind,
        captions,
        lambda phase: join_uri(identity.uri(store_root), "checkpoints", phase),
        resources,
        world,
        lambda phase: lambda event: on_event(phase, event) if on_event else None,
        check_owner,
    )
    check_owner()
    held_out, texts = read_pictures(pairs, maps, "validation")
    with tempfile.TemporaryDirectory() as folder:
        write_base(
            base, config, Path(folder), {k: v[:_SCORED_IMAGES] for k, v in held_out.items()}, texts, len(captions) // 2
        )
        files = write_folder(identity, store_root, BASE_FOLDER, Path(folder))
    files.append(write_file(identity, store_root, "config.json", config.model_dump_json(indent=2).encode()))
    return seal_manifest(identity, store_root, files, counts={"scenes": len(captions) // 2})


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


def read_pictures(
    pairs: ManifestRef, maps: Mapping[str, ManifestRef], split: Split
) -> tuple[dict[str, NDArray[np.uint8]], list[str]]:
    """Return every picture of a split by kind (N, H, W, 3: each pair's input, then its edited twin) and the captions."""
    data = InContextData(open_manifest(pairs.uri), {name: open_manifest(ref.uri) for name, ref in maps.items()}, split)
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
