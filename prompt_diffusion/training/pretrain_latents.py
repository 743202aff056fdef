"""The pictures that the demo's base is made from, and the stage of their latents: all that its UNet is shown."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from prompt_diffusion.data.dataset import InContextData, Side
from prompt_diffusion.data.families import FAMILIES, find_source, vary
from prompt_diffusion.data.records import Split, arrays_table, read_array
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.transforms import Pixels
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, find_sealed, open_manifest
from prompt_diffusion.store.records import OnProgress
from prompt_diffusion.store.sharded import ShardRows, run_sharded_stage
from prompt_diffusion.training.config import TrainResources
from prompt_diffusion.training.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

LATENTS_VERSION = 1
VAE_FOLDER = "vae"
_SIDES: tuple[Side, Side] = ("input", "edited")

Maps = Mapping[str, ManifestRef]


@dataclass(frozen=True)
class ScenePictures:
    """Every picture of a split: a row each for a pair's input and then for its edited twin."""

    data: InContextData
    captions: list[str]
    """One a row."""

    def read(self, kind: str, row: int) -> Pixels:
        """Return the photograph (``image``) or a condition map of a row."""
        return self.data.image(row // 2, _SIDES[row % 2], None if kind == "image" else kind)


def open_pictures(pairs: ManifestRef, maps: Maps, split: Split, resources: TrainResources) -> ScenePictures:
    """Open the pictures of a split, which are read one by one from the local shard cache."""
    manifests = {name: open_manifest(ref.uri) for name, ref in maps.items()}
    cache = ShardCache(resources.cache_dir, resources.cache_bytes)
    data = InContextData(open_manifest(pairs.uri), manifests, split, cache)
    return ScenePictures(data, [data.captions(side)[row] for row in range(data.num_rows) for side in _SIDES])


def list_inputs(pairs: ManifestRef, maps: Maps) -> dict[str, str]:
    """Return the fingerprints of image pairs and condition maps, by role."""
    return {"pairs": pairs.fingerprint, **{f"maps/{name}": ref.fingerprint for name, ref in sorted(maps.items())}}


def identify_latents(config: PretrainConfig, autoencoder: ManifestRef, pairs: ManifestRef, maps: Maps) -> StageIdentity:
    """Return the identity of the latents: the kinds, the seed of their families' members, the autoencoder, the pictures."""
    fields = {"kinds": list(config.unet_shares), "seed": config.seed}
    inputs = {"autoencoder": autoencoder.fingerprint, **list_inputs(pairs, maps)}
    return StageIdentity(stage="pretrain-latents", version=LATENTS_VERSION, config=fields, inputs=inputs)


def run_latents(
    config: PretrainConfig,
    autoencoder: ManifestRef,
    pairs: ManifestRef,
    maps: Maps,
    store_root: str,
    resources: TrainResources,
    on_progress: OnProgress | None = None,
) -> ManifestRef:
    """Seal the latents of all that the UNet is shown: a shard for each of the pairs' that has rows of the train split.

    A row is a pair; a column is a kind: sides, C, h, w. Photographs, mirrored ones too, have both sides; of the maps, which
    are alike in both and need no caption, there is the input's, in a member of its family of its own.
    """
    identity = identify_latents(config, autoencoder, pairs, maps)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    import torch

    from prompt_diffusion.training.pretrain import encode_pictures

    torch.set_num_threads(resources.threads_per_process)
    shown, vae = open_pictures(pairs, maps, "train", resources), load_autoencoder(autoencoder)
    ends = np.cumsum([rows for rows in shown.data.shard_rows if rows])

    def show(kind: str, row: int) -> Pixels:
        stream = list(FAMILIES).index(kind) if kind in FAMILIES else 0
        return vary(kind, shown.read(find_source(kind), row), sample_generator(config.seed, row, stream))

    def make_shard(index: int) -> ShardRows:
        rows = range(int(ends[index - 1]) if index else 0, int(ends[index]))
        arrays = {}
        for kind in config.unet_shares:
            sides = range(2 if find_source(kind) == "image" else 1)
            latents = encode_pictures(vae, (show(kind, 2 * row + side) for row in rows for side in sides))
            arrays[kind] = latents.view(len(rows), len(sides), *latents.shape[1:]).numpy()
        table: pa.Table = arrays_table({"sample_id": [shown.data.sample_ids[row] for row in rows]}, arrays)
        return table, []

    return run_sharded_stage(identity, store_root, len(ends), make_shard, on_progress=on_progress)


def load_autoencoder(autoencoder: ManifestRef) -> "AutoencoderKL":
    """Load a sealed autoencoder, to be used."""
    from diffusers import AutoencoderKL

    with tempfile.TemporaryDirectory() as cache:
        folder = open_manifest(autoencoder.uri).fetch_folder(VAE_FOLDER, Path(cache))
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    return vae.eval().requires_grad_(False)


def read_latents(latents: ManifestRef, kinds: Mapping[str, float]) -> "dict[str, Tensor]":
    """Return the latents by kind: N, C, h, w."""
    import torch

    manifest = open_manifest(latents.uri)
    parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for shard in manifest.shards:
        table = manifest.read_shard(shard)
        for kind in kinds:
            parts[kind].append(torch.from_numpy(read_array(table, kind).copy()).flatten(0, 1))
    return {kind: torch.cat(found) for kind, found in parts.items()}
