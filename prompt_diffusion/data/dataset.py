"""Sealed manifests as in-context samples: example pair, query, target and text of a vision task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prompt_diffusion.data.records import Split
from prompt_diffusion.data.transforms import Pixels, decode_image
from prompt_diffusion.store.manifest import Manifest
from prompt_diffusion.vision_tasks import ExamplePolicy, VisionTask

Side = Literal["input", "edited"]

# what is read of the image pairs; their exact maps would be held in memory a second time
_PAIR_COLUMNS = (
    "sample_id",
    "group_id",
    "split",
    "input_prompt",
    "edited_prompt",
    "input_image",
    "edited_image",
)


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
    """The rows of one split, with their condition maps; images are decoded once and kept."""

    def __init__(self, pairs: Manifest, maps: Mapping[str, Manifest], split: Split) -> None:
        table = pairs.read_table(list(_PAIR_COLUMNS))
        rows = pc.indices_nonzero(pc.equal(table["split"], split)).to_numpy()
        if not len(rows):
            raise ValueError(
                f"{pairs.ref.uri} has no row of split {split!r}: give it a larger share in ingest.split_fractions"
            )
        kept = table.take(rows)
        self.split: Split = split
        self.sample_ids: list[str] = kept["sample_id"].to_pylist()
        self.group_ids: list[str] = kept["group_id"].to_pylist()
        self._captions: dict[Side, list[str]] = {
            "input": kept["input_prompt"].to_pylist(),
            "edited": kept["edited_prompt"].to_pylist(),
        }
        self._encoded: dict[tuple[str | None, Side], pa.ChunkedArray] = {
            (None, "input"): kept["input_image"],
            (None, "edited"): kept["edited_image"],
        }
        for condition, manifest in maps.items():
            found = manifest.read_table(["sample_id", "input_map", "edited_map"])
            if not found["sample_id"].equals(table["sample_id"]):
                raise ValueError(f"{manifest.ref.uri} is not aligned with the image pairs {pairs.ref.uri}")
            self._encoded[condition, "input"] = found["input_map"].take(rows)
            self._encoded[condition, "edited"] = found["edited_map"].take(rows)
        self.rows = rows
        """Position of each row of the split in the whole manifest: what latents are looked up by."""
        self._decoded: dict[tuple[str | None, Side, int], Pixels] = {}
        self._groups: dict[str, list[int]] = {}
        for row, group in enumerate(self.group_ids):
            self._groups.setdefault(group, []).append(row)

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return len(self.sample_ids)

    def captions(self, side: Side) -> list[str]:
        """Return the captions of one side, a row each."""
        return self._captions[side]

    def image(self, row: int, side: Side, condition: str | None) -> Pixels:
        """Return the photograph (``condition=None``) or a condition map of one side: uint8 H, W, 3, read-only."""
        key = (condition, side, row)
        if key not in self._decoded:
            if (condition, side) not in self._encoded:
                known = sorted({c for c, _ in self._encoded if c})
                raise ValueError(f"no condition maps {condition!r} here: there are {', '.join(known) or 'none'}")
            decoded = decode_image(self._encoded[condition, side][row]["bytes"].as_py())
            decoded.flags.writeable = False
            self._decoded[key] = decoded
        return self._decoded[key]

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
