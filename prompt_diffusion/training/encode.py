"""Stages ``encode`` and ``encode-text``: what the frozen networks make of targets and captions, once and not in every step.

There is no augmentation, so sampling from the stored mean and standard deviation loses nothing against the encoder itself, and
a caption's embedding is the same whenever it is computed.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from prompt_diffusion.data.dataset import number_captions
from prompt_diffusion.data.records import arrays_table
from prompt_diffusion.data.transforms import Pixels, decode_image, to_model_range
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.model.references import base_digest
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, Reject, open_manifest
from prompt_diffusion.store.records import OnProgress
from prompt_diffusion.store.sharded import run_sharded_stage

if TYPE_CHECKING:
    from prompt_diffusion.model.base import Base

VERSION = 2
TEXT_VERSION = 1
_COLUMNS = {"ingest": "edited_image", "annotate": "edited_map"}

Floats = NDArray[np.float32]


class EncodeConfig(FrozenModel):
    """Which networks encode."""

    base: str
    """The base model whose VAE and text encoder are used: ``demo-base``, a folder, or a hub repository."""


class EncodeResources(FrozenModel):
    """Where the encoders run: never part of the fingerprint."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    batch_size: int = Field(default=32, ge=1)
    """Images or texts at once."""


_DEFAULT_RESOURCES = EncodeResources()


def identify_encode(config: EncodeConfig, images: ManifestRef) -> StageIdentity:
    """Return the identity of the latents of one manifest: the photographs' (``ingest``) or one condition's (``annotate``)."""
    if images.stage not in _COLUMNS:
        raise ValueError(f"stage encode reads manifests of {', '.join(_COLUMNS)}, not of {images.stage!r}")
    return StageIdentity(
        stage="encode",
        version=VERSION,
        config={},
        inputs={"base": base_digest(config.base, ("vae",)), "images": images.fingerprint},
    )


def run_encode(
    config: EncodeConfig,
    images: ManifestRef,
    store_root: str,
    resources: EncodeResources = _DEFAULT_RESOURCES,
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Seal ``sample_id``, ``edited_mean`` and ``edited_std`` (latents already scaled), shards aligned with the images'."""
    manifest, column = open_manifest(images.uri), _COLUMNS[images.stage]
    base = _load_when_needed(config, resources)

    def make_shard(index: int) -> tuple[pa.Table, list[Reject]]:
        table = manifest.read_shard(manifest.shards[index], ["sample_id", column])
        pixels = np.stack([decode_image(cell["bytes"]) for cell in table[column].to_pylist()])
        mean, std = encode_posterior(base().vae, pixels, resources.batch_size)
        ids = table["sample_id"].to_pylist()
        return arrays_table({"sample_id": ids}, {"edited_mean": mean, "edited_std": std}), []

    return run_sharded_stage(
        identify_encode(config, images), store_root, len(manifest.shards), make_shard, on_progress=on_progress
    )


def identify_encode_text(config: EncodeConfig, pairs: ManifestRef) -> StageIdentity:
    """Return the identity of the text embeddings of the pairs' captions."""
    return StageIdentity(
        stage="encode-text",
        version=TEXT_VERSION,
        config={},
        inputs={"base": base_digest(config.base, ("text_encoder", "tokenizer")), "pairs": pairs.fingerprint},
    )


def run_encode_text(
    config: EncodeConfig,
    pairs: ManifestRef,
    store_root: str,
    resources: EncodeResources = _DEFAULT_RESOURCES,
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Seal ``caption`` and ``embedding`` (L, C) of the edited captions: a shard each of the pairs', of its distinct ones."""
    manifest = open_manifest(pairs.uri)
    base = _load_when_needed(config, resources)

    def make_shard(index: int) -> tuple[pa.Table, list[Reject]]:
        table = manifest.read_shard(manifest.shards[index], ["edited_prompt"])
        captions = list(number_captions(table["edited_prompt"].to_pylist()))
        return arrays_table(
            {"caption": captions}, {"embedding": embed_captions(base(), captions, resources.batch_size)}
        ), []

    return run_sharded_stage(
        identify_encode_text(config, pairs), store_root, len(manifest.shards), make_shard, on_progress=on_progress
    )


def _load_when_needed(config: EncodeConfig, resources: EncodeResources) -> "Callable[[], Base]":
    """Return the base, loaded for the first missing shard: a rerun of a sealed stage loads no weights."""

    @cache
    def load() -> "Base":
        from prompt_diffusion.engine.distributed import choose_device
        from prompt_diffusion.model.base import load_base

        base, device = load_base(config.base), choose_device(resources.device)
        for part in (base.vae, base.text_encoder):
            part.to(device)
        return base

    return load


def encode_posterior(vae: Any, images: Pixels, batch_size: int = 32) -> tuple[Floats, Floats]:  # noqa: ANN401
    """Return mean and standard deviation of the posterior, float32 N, C, h, w, in the scale that the UNet sees."""
    import torch

    means, stds = [], []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            posterior = vae.encode(to_model_range(images[start : start + batch_size]).to(vae.device)).latent_dist
            means.append(posterior.mean.cpu().numpy() * vae.config.scaling_factor)
            stds.append(posterior.std.cpu().numpy() * vae.config.scaling_factor)
    return np.concatenate(means), np.concatenate(stds)


def embed_captions(base: "Base", texts: Sequence[str], batch_size: int = 32) -> Floats:
    """Return text embeddings, float32 N, L, C."""
    parts = [
        base.encode_text(texts[start : start + batch_size]).cpu().numpy() for start in range(0, len(texts), batch_size)
    ]
    return np.concatenate(parts)
