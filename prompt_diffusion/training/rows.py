"""The rows that a training reads, with their latents and text embeddings, and what fetches them ahead of the samples."""

import threading
from concurrent.futures import Executor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.cached_shard import Array
from prompt_diffusion.data.dataset import InContextData, check_aligned, check_made_of
from prompt_diffusion.data.records import Split
from prompt_diffusion.data.sampler import GroupOrder, Order, RowOrder
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.store.manifest import Manifest, open_manifest
from prompt_diffusion.training.augmented import find_rows
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import IMAGE_TARGET, TrainInputs
from prompt_diffusion.vision_tasks import Draw, find_vision_task

Floats = NDArray[np.float32]


class TrainingData:
    """One split of a dataset, with latents and text embeddings."""

    def __init__(
        self, inputs: TrainInputs, cache: ShardCache, seed: int, split: Split = "train", draw: Draw = "row"
    ) -> None:
        """Open the inputs; ValueError where they do not belong together."""
        pairs = open_manifest(inputs.pairs.uri)
        maps = {condition: open_manifest(ref.uri) for condition, ref in inputs.maps.items()}
        self.rows = InContextData(pairs, maps, split, cache)
        self.text = open_manifest(inputs.text.uri)
        check_made_of(self.text, "pairs", pairs)
        self.latents: dict[str | None, Manifest] = {}
        for target, ref in inputs.latents.items():
            manifest = open_manifest(ref.uri)
            check_aligned(manifest, "images", pairs if target == IMAGE_TARGET else maps[target])
            self.latents[None if target == IMAGE_TARGET else target] = manifest
        self.order: Order = RowOrder(seed, self.rows.shard_rows)
        if draw == "group":
            self.order = GroupOrder(seed, self.rows.shard_rows, self.rows.group_ids)
        self.cache = cache

    @property
    def manifests(self) -> list[Manifest]:
        """Every manifest that a sample may be read from."""
        return [self.rows.pairs, *self.rows.maps.values(), *self.latents.values(), self.text]

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """C, h, w of every target's latents."""
        return self.read_posterior(next(iter(self.latents)), 0)[0].shape

    def read_posterior(self, target: str | None, row: int) -> tuple[Floats, Floats]:
        """Return mean and standard deviation, float32 C, h, w, of a row's target (None: the photograph)."""
        shard, position = self.rows.places[row]
        manifest = self.latents[target]
        return (
            self.cache.read_row(manifest, shard, "edited_mean", position),
            self.cache.read_row(manifest, shard, "edited_std", position),
        )

    def read_text(self, row: int, out: Array | None = None) -> Floats:
        """Return the embedding, float32 L, C, of a row's caption, in ``out`` if given."""
        return self.cache.read_row(
            self.text, self.rows.places[row][0], "embedding", self.rows.caption_positions[row], out
        )


def open_training_data(
    config: TrainConfig, inputs: TrainInputs, cache: ShardCache, split: Split
) -> dict[str, TrainingData]:
    """Open the data of each vision task of a recipe; tasks of one dataset share it.

    ValueError where an augmentation of the recipe has no dataset with its condition maps.
    """
    used = inputs.narrow(config.vision_tasks)
    datasets = [TrainingData(each, cache, config.seed, split, config.draw) for each in used.datasets]
    data = {name: datasets[used.find_dataset(name)] for name in config.vision_tasks}
    for family in config.augmentation:
        for name in config.vision_tasks:
            find_rows(data, find_vision_task(name), family)
    return data


class WindowFetcher:
    """Fetches the shards of the stream's current window and of the next one, ahead of the samples."""

    def __init__(self, data: TrainingData, pool: Executor) -> None:
        self.data, self._pool = data, pool
        self._lock = threading.Lock()
        self._asked: set[tuple[int, int]] = set()

    def advance(self, index: int) -> None:
        """Start fetching for the window of this sample index, unless that was done."""
        order = self.data.order
        epoch, number = order.find_window(index)
        with self._lock:
            if (epoch, number) in self._asked:
                return
            self._asked.add((epoch, number))
        windows = order.windows(epoch)
        following = windows[number + 1] if number + 1 < len(windows) else order.windows(epoch + 1)[0]
        for shard in (*windows[number], *following):
            for manifest in self.data.manifests:
                # An error here is not lost: it is raised again where a row of the shard is read.
                self._pool.submit(self.data.cache.fetch, manifest, shard)
