"""Stages ``encode`` and ``encode-text``: what the frozen networks make of targets and captions, once and not in every step.

Photographs and maps are not augmented themselves, so sampling from the stored mean and deviation loses nothing against running
the encoder, and a caption's embedding is the same whenever it is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prompt_diffusion.data.dataset import number_captions
from prompt_diffusion.data.records import arrays_table
from prompt_diffusion.data.transforms import Pixels, decode_image, to_model_range
from prompt_diffusion.device import DeviceResources, choose_device
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.model.references import base_digest
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import Manifest, ManifestRef, open_manifest
from prompt_diffusion.store.sharded import MakeShard, ShardRows
from prompt_diffusion.store.stage import Context, ShardedStage

if TYPE_CHECKING:
    from prompt_diffusion.model.base import Base

VERSION = 3
TEXT_VERSION = 2
_COLUMNS = {"ingest": "edited_image", "annotate": "edited_map"}

Floats = NDArray[np.float32]


class EncodeConfig(FrozenModel):
    """Which networks encode."""

    base: str
    """The base model whose VAE and text encoder are used: ``demo-base``, a folder, or a hub repository."""


class EncodeResources(DeviceResources):
    """Where the encoders run: never part of the fingerprint."""

    batch_size: int = Field(default=32, ge=1)
    """Images or texts at once."""


@dataclass(frozen=True)
class Encode(ShardedStage[EncodeResources]):
    """The stage: latents of the edited side of one manifest, the photographs' (``ingest``) or one condition's (``annotate``).

    Its shards hold ``sample_id``, ``edited_mean`` and ``edited_std`` (latents already scaled), aligned with the images'.
    """

    config: EncodeConfig
    images: ManifestRef

    @cached_property
    def manifest(self) -> Manifest:
        """The images."""
        return open_manifest(self.images.uri)

    @property
    def title(self) -> str:
        """The name shown to people."""
        return f"encode {self.manifest.identity.config.get('condition', 'image')}"

    def identify(self) -> StageIdentity:
        """Return the autoencoder's weights and the images."""
        if self.images.stage not in _COLUMNS:
            raise ValueError(f"stage encode reads manifests of {', '.join(_COLUMNS)}, not of {self.images.stage!r}")
        weights = StageInput(role="base", fingerprint=base_digest(self.config.base, ("vae",)))
        return StageIdentity(
            stage="encode", version=VERSION, config={}, inputs=(weights, StageInput.of("images", self.images))
        )

    def count_shards(self) -> int:
        """Return the images' own number of shards."""
        return len(self.manifest.shards)

    @contextmanager
    def open_maker(self, context: Context[EncodeResources]) -> Iterator[MakeShard]:
        """Yield the function that encodes a shard's images."""
        manifest, column = self.manifest, _COLUMNS[self.images.stage]
        base = _load_when_needed(self.config, context.resources)

        def make_shard(index: int) -> ShardRows:
            table = manifest.read_shard(manifest.shards[index], ["sample_id", column])
            pixels = np.stack([decode_image(cell["bytes"]) for cell in table[column].to_pylist()])
            mean, std = encode_posterior(base().vae, pixels, context.resources.batch_size)
            ids = table["sample_id"].to_pylist()
            return arrays_table({"sample_id": ids}, {"edited_mean": mean, "edited_std": std}), []

        yield make_shard


@dataclass(frozen=True)
class EncodeText(ShardedStage[EncodeResources]):
    """The stage: ``caption`` and ``embedding`` (L, C) of the edited captions, the distinct ones of each shard of the pairs."""

    config: EncodeConfig
    pairs: ManifestRef

    @cached_property
    def manifest(self) -> Manifest:
        """The image pairs."""
        return open_manifest(self.pairs.uri)

    @property
    def title(self) -> str:
        """The name shown to people."""
        return "encode text"

    def identify(self) -> StageIdentity:
        """Return the text encoder's weights and the pairs."""
        weights = StageInput(role="base", fingerprint=base_digest(self.config.base, ("text_encoder", "tokenizer")))
        return StageIdentity(
            stage="encode-text", version=TEXT_VERSION, config={}, inputs=(weights, StageInput.of("pairs", self.pairs))
        )

    def count_shards(self) -> int:
        """Return the pairs' own number of shards."""
        return len(self.manifest.shards)

    @contextmanager
    def open_maker(self, context: Context[EncodeResources]) -> Iterator[MakeShard]:
        """Yield the function that embeds a shard's captions."""
        manifest, base = self.manifest, _load_when_needed(self.config, context.resources)

        def make_shard(index: int) -> ShardRows:
            table = manifest.read_shard(manifest.shards[index], ["edited_prompt"])
            captions = list(number_captions(table["edited_prompt"].to_pylist()))
            embeddings = embed_texts(base(), captions, context.resources.batch_size)
            return arrays_table({"caption": captions}, {"embedding": embeddings}), []

        yield make_shard


def _load_when_needed(config: EncodeConfig, resources: EncodeResources) -> "Callable[[], Base]":
    """Return the base, loaded for the first missing shard: where an earlier run left every shard, no weights are loaded."""

    @cache
    def load() -> "Base":
        from prompt_diffusion.model.base import load_base

        device, base = choose_device(resources.device), load_base(config.base)
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


def embed_texts(base: "Base", texts: Sequence[str], batch_size: int = 32) -> Floats:
    """Return text embeddings, float32 N, L, C."""
    parts = [
        base.encode_text(texts[start : start + batch_size]).cpu().numpy() for start in range(0, len(texts), batch_size)
    ]
    return np.concatenate(parts)
