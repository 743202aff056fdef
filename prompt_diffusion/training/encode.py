"""Stage ``encode``: the VAE's posterior of everything that can be a target, once, instead of in every training step.

There is no augmentation, so sampling from the stored mean and standard deviation loses nothing against the encoder itself.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from prompt_diffusion.data.records import latents_table
from prompt_diffusion.data.transforms import decode_image, to_model_range
from prompt_diffusion.model.references import base_digest
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, Reject, open_manifest
from prompt_diffusion.store.records import OnProgress
from prompt_diffusion.store.sharded import run_sharded_stage

VERSION = 1
_BATCH_SIZE = 32
_COLUMNS = {"ingest": "edited_image", "annotate": "edited_map"}


class EncodeConfig(BaseModel):
    """Which autoencoder encodes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base: str
    """The base model whose VAE encodes: ``demo-base``, a folder, or a hub repository."""


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
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Seal ``sample_id``, ``edited_mean`` and ``edited_std`` (latents already scaled), shards aligned with the images'."""
    manifest, column = open_manifest(images.uri), _COLUMNS[images.stage]
    vae: list[Any] = []  # loaded for the first missing shard: a rerun of a sealed stage loads no weights

    def make_shard(index: int) -> tuple[pa.Table, list[Reject]]:
        if not vae:
            from prompt_diffusion.model.base import load_base

            vae.append(load_base(config.base).vae)
        table = manifest.read_shard(manifest.shards[index], ["sample_id", column])
        pixels = np.stack([decode_image(cell["bytes"]) for cell in table[column].to_pylist()])
        mean, std = encode_posterior(vae[0], pixels)
        return latents_table(table["sample_id"].to_pylist(), {"edited": (mean, std)}), []

    return run_sharded_stage(
        identify_encode(config, images), store_root, len(manifest.shards), make_shard, on_progress=on_progress
    )


def encode_posterior(vae: Any, images: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # noqa: ANN401
    """Return mean and standard deviation of the posterior, float32 N, C, h, w, in the scale that the UNet sees."""
    import torch

    means, stds = [], []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH_SIZE):
            posterior = vae.encode(to_model_range(images[start : start + _BATCH_SIZE])).latent_dist
            means.append(posterior.mean.numpy() * vae.config.scaling_factor)
            stds.append(posterior.std.numpy() * vae.config.scaling_factor)
    return np.concatenate(means), np.concatenate(stds)
