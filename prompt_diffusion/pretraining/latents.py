"""The pictures that the demo's base is made from, and the stage ``pretrain-latents``: all that its UNet is shown."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prompt_diffusion.building import builds_networks
from prompt_diffusion.data.dataset import Dataset, InContextData, Side
from prompt_diffusion.data.families import IMAGE, find_source, show_row
from prompt_diffusion.data.records import Split, arrays_table, read_array
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.transforms import Pixels
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sharded import MakeShard, ShardRows
from prompt_diffusion.store.stage import Context, ShardedStage

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

LATENTS_VERSION = 1
VAE_FOLDER = "vae"
_SPLIT: Split = "train"
_SIDES: tuple[Side, Side] = ("input", "edited")


@dataclass(frozen=True)
class ScenePictures:
    """Every picture of a split: a row each for a pair's input and then for its edited twin."""

    data: InContextData
    captions: list[str]
    """One a row."""

    def read(self, kind: str, row: int) -> Pixels:
        """Return the photograph (``image``) or a condition map of a row."""
        return self.data.image(row // 2, _SIDES[row % 2], None if kind == IMAGE else kind)


def open_pictures(dataset: Dataset, split: Split, resources: TrainResources) -> ScenePictures:
    """Open the pictures of a split, which are read one by one from the local shard cache."""
    maps = {name: open_manifest(ref.uri) for name, ref in dataset.maps.items()}
    cache = ShardCache(resources.cache_dir, resources.cache_bytes)
    data = InContextData(open_manifest(dataset.pairs.uri), maps, split, cache)
    return ScenePictures(data, [data.captions(side)[row] for row in range(data.num_rows) for side in _SIDES])


def list_picture_inputs(dataset: Dataset, kinds: Iterable[str]) -> tuple[StageInput, ...]:
    """Return the image pairs and every condition map; ValueError for a kind of picture that they cannot give."""
    for source in {find_source(kind) for kind in kinds} - {IMAGE}:
        dataset.find_map(source)
    return dataset.list_inputs(sorted(dataset.maps))


@dataclass(frozen=True)
class PretrainLatents(ShardedStage[TrainResources]):
    """The stage: latents of all that the UNet is shown, a shard for each of the pairs' that has rows of the train split.

    A row is a pair; a column is a kind: sides, C, h, w. Photographs, mirrored ones too, have both sides; of the maps, which
    are alike in both and need no caption, there is the input's, in a member of its family of its own.
    """

    config: PretrainConfig
    autoencoder: ManifestRef
    dataset: Dataset

    @property
    def title(self) -> str:
        """What people call it."""
        return "pretrain latents"

    @cached_property
    def shard_ends(self) -> list[int]:
        """Where the pairs of each shard end among those of the split."""
        data = InContextData(open_manifest(self.dataset.pairs.uri), {}, _SPLIT)
        ends: list[int] = np.cumsum([rows for rows in data.shard_rows if rows]).tolist()
        return ends

    def identify(self) -> StageIdentity:
        """Return the kinds, the seed of their families' members, the autoencoder and the pictures."""
        kinds = list(self.config.unet_shares)
        return StageIdentity(
            stage="pretrain-latents",
            version=LATENTS_VERSION,
            config={"kinds": kinds, "seed": self.config.seed},
            inputs=(StageInput.of("autoencoder", self.autoencoder), *list_picture_inputs(self.dataset, kinds)),
        )

    def count_shards(self) -> int:
        """Return how many of the pairs' shards have rows of the split."""
        return len(self.shard_ends)

    @contextmanager
    def open_maker(self, context: Context[TrainResources]) -> Iterator[MakeShard]:
        """Give what encodes a shard's pictures."""
        import torch

        from prompt_diffusion.pretraining.train import encode_pictures

        torch.set_num_threads(context.resources.threads_per_process)
        shown, vae = open_pictures(self.dataset, _SPLIT, context.resources), load_autoencoder(self.autoencoder)

        def make_shard(index: int) -> ShardRows:
            rows = range(self.shard_ends[index - 1] if index else 0, self.shard_ends[index])
            arrays = {}
            for kind in self.config.unet_shares:
                sides = range(2 if find_source(kind) == IMAGE else 1)
                shown_rows = [2 * row + side for row in rows for side in sides]
                pictures = (show_row(kind, shown.read, self.config.seed, row) for row in shown_rows)
                latents = encode_pictures(vae, pictures)
                arrays[kind] = latents.view(len(rows), len(sides), *latents.shape[1:]).numpy()
            return arrays_table({"sample_id": [shown.data.sample_ids[row] for row in rows]}, arrays), []

        yield make_shard


@builds_networks
def load_autoencoder(autoencoder: ManifestRef) -> "AutoencoderKL":
    """Load a sealed autoencoder, to be used."""
    from diffusers import AutoencoderKL

    with tempfile.TemporaryDirectory() as cache:
        folder = open_manifest(autoencoder.uri).fetch_folder(VAE_FOLDER, Path(cache))
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    return vae.eval().requires_grad_(False)


def read_latents(latents: ManifestRef, kinds: Iterable[str]) -> "dict[str, Tensor]":
    """Return the latents by kind: N, C, h, w."""
    import torch

    manifest = open_manifest(latents.uri)
    parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for shard in manifest.shards:
        table = manifest.read_shard(shard)
        for kind, found in parts.items():
            found.append(torch.from_numpy(read_array(table, kind).copy()).flatten(0, 1))
    return {kind: torch.cat(found) for kind, found in parts.items()}
