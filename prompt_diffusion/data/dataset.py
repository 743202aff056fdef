"""Sealed manifests as in-context samples: example pair, query, target and text of a vision task."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prompt_diffusion.data.records import Split
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.transforms import Pixels
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import StageInput
from prompt_diffusion.store.manifest import Manifest, ManifestRef
from prompt_diffusion.vision_tasks import ExamplePolicy, VisionTask

Side = Literal["input", "edited"]

_INDEX_COLUMNS = ["sample_id", "group_id", "split", "input_prompt", "edited_prompt"]


class Dataset(FrozenModel):
    """Sealed image pairs with their condition maps: what trainings and evaluations read, as one value."""

    pairs: ManifestRef
    """The image pairs."""
    maps: dict[str, ManifestRef]
    """Condition maps of those pairs, by condition."""

    def find_map(self, condition: str) -> ManifestRef:
        """Return the manifest of a condition's maps; ValueError lists the conditions that exist."""
        if condition not in self.maps:
            there = ", ".join(sorted(self.maps)) or "none"
            raise ValueError(f"there are no maps of condition {condition!r}, only of {there}")
        return self.maps[condition]

    def list_inputs(self, conditions: Iterable[str]) -> tuple[StageInput, ...]:
        """Return the pairs and the maps of those conditions as what a stage reads."""
        maps = (StageInput.of(f"maps/{condition}", self.find_map(condition)) for condition in conditions)
        return (StageInput.of("pairs", self.pairs), *maps)


@dataclass(frozen=True, slots=True)
class Sample:
    """One in-context sample; images are uint8 H, W, 3."""

    sample_id: str
    example_id: str
    example_source: Pixels
    example_target: Pixels
    query: Pixels
    target: Pixels
    prompt: str


class InContextData:
    """The rows of one split, with their condition maps: texts in memory, images in a local shard cache."""

    def __init__(
        self, pairs: Manifest, maps: Mapping[str, Manifest], split: Split, cache: ShardCache | None = None
    ) -> None:
        """Read the index of the pairs; ValueError for an empty split, or maps of other pairs."""
        for manifest in maps.values():
            check_aligned(manifest, "pairs", pairs)
        table = pairs.read_index(_INDEX_COLUMNS)
        rows = pc.indices_nonzero(pc.equal(table["split"], split)).to_numpy().astype(np.int64)
        if not len(rows):
            raise ValueError(
                f"{pairs.ref.uri} has no row of split {split!r}: give it a larger share in ingest.split_fractions"
            )
        self.split: Split = split
        self.cache = cache or ShardCache()
        self.pairs, self.maps = pairs, dict(maps)
        kept: pa.Table = table.take(rows)
        self.sample_ids: list[str] = kept["sample_id"].to_pylist()
        self._rows_by_id = {sample_id: row for row, sample_id in enumerate(self.sample_ids)}
        self.group_ids: list[str] = kept["group_id"].to_pylist()
        self._captions: dict[Side, list[str]] = {
            "input": kept["input_prompt"].to_pylist(),
            "edited": kept["edited_prompt"].to_pylist(),
        }
        starts = np.concatenate([[0], np.cumsum([shard.rows for shard in pairs.shards])])
        shards = np.searchsorted(starts, rows, side="right") - 1
        self.places: list[tuple[int, int]] = list(zip(shards.tolist(), (rows - starts[shards]).tolist(), strict=True))
        """Shard of each row and its position there: the same for maps and latents."""
        self.shard_rows = tuple(np.bincount(shards, minlength=len(pairs.shards)).tolist())
        """Rows of the split in each shard."""
        self.caption_positions = _find_caption_positions(table["edited_prompt"].to_pylist(), starts)[rows].tolist()
        """Position of each row's edited caption among the distinct ones of its shard."""
        self._groups: dict[str, list[int]] = {}
        for row, group in enumerate(self.group_ids):
            self._groups.setdefault(group, []).append(row)

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return len(self.sample_ids)

    def find_rows(self, sample_ids: Iterable[str]) -> list[int]:
        """Return the row of each sample; ValueError names one that the split does not have."""
        rows = []
        for sample_id in sample_ids:
            if sample_id not in self._rows_by_id:
                raise ValueError(f"the {self.split} split of {self.pairs.ref.uri} has no sample {sample_id!r}")
            rows.append(self._rows_by_id[sample_id])
        return rows

    def captions(self, side: Side) -> list[str]:
        """Return the captions of one side, one per row."""
        return self._captions[side]

    def image(self, row: int, side: Side, condition: str | None, out: Pixels | None = None) -> Pixels:
        """Return the photograph (``condition=None``) or a condition map of one side: uint8 H, W, 3, in ``out`` if given."""
        if condition is not None and condition not in self.maps:
            raise ValueError(
                f"no condition maps {condition!r} here: there are {', '.join(sorted(self.maps)) or 'none'}"
            )
        manifest = self.pairs if condition is None else self.maps[condition]
        column = f"{side}_{'image' if condition is None else 'map'}"
        shard, position = self.places[row]
        pixels: Pixels = self.cache.read_row(manifest, shard, column, position, out)
        # an order of magnitude faster than NumPy's repeat
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB, dst=out) if pixels.shape[2] == 1 else pixels

    def choose_example(self, policy: ExamplePolicy, query_row: int, generator: np.random.Generator) -> int:
        """Return the row that the example pair is taken from.

        ``same_row``: the query's own twin. ``same_group``: a uniformly drawn row of its prompt group (as published, the
        query's row among them). ``other_group``: a uniformly drawn row of any other prompt group.
        """
        if policy == "same_row":
            return query_row
        group = self._groups[self.group_ids[query_row]]
        if policy == "same_group":
            return group[int(generator.integers(len(group)))]
        if len(group) == self.num_rows:
            raise ValueError(
                f"split {self.split!r} has one prompt group only: 'other_group' has nothing to choose from"
            )
        position = int(generator.integers(self.num_rows - len(group)))
        for row in group:  # ascending: skip the group's own rows
            position += position >= row
        return position

    def assemble(self, vision_task: VisionTask, query_row: int, example_row: int) -> Sample:
        """Build a sample: the example pair from the input image, query and target from the edited image."""
        source, target = vision_task.source_condition, vision_task.target_condition
        return Sample(
            sample_id=self.sample_ids[query_row],
            example_id=self.sample_ids[example_row],
            example_source=self.image(example_row, "input", source),
            example_target=self.image(example_row, "input", target),
            query=self.image(query_row, "edited", source),
            target=self.image(query_row, "edited", target),
            prompt=vision_task.text or self._captions["edited"][query_row],
        )


def number_captions(captions: Iterable[str]) -> dict[str, int]:
    """Number the distinct captions of a shard in the order in which they come."""
    return {caption: number for number, caption in enumerate(dict.fromkeys(captions))}


def _find_caption_positions(captions: list[str], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    positions: list[int] = []
    for start, end in pairwise(starts.tolist()):
        numbers = number_captions(captions[start:end])
        positions += [numbers[caption] for caption in captions[start:end]]
    return np.array(positions, np.int64)


def check_made_of(manifest: Manifest, role: str, of: Manifest) -> None:
    """Raise ValueError where a manifest was not made from the other one."""
    found = manifest.identity.find_input(role)
    if found is None or found.fingerprint != of.ref.fingerprint:
        raise ValueError(f"{manifest.ref.uri} is not aligned with {of.ref.uri}: it was made of other {role}")


def check_aligned(manifest: Manifest, role: str, of: Manifest) -> None:
    """Raise ValueError where a manifest was not made from the other one, or its shards do not match row by row."""
    check_made_of(manifest, role, of)
    if [shard.rows for shard in manifest.shards] != [shard.rows for shard in of.shards]:
        raise ValueError(
            f"{manifest.ref.uri} is not aligned with {of.ref.uri}: their shards have other numbers of rows"
        )
