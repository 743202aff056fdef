"""Examples of other scenes that show the query's classes: what an example does not show, nobody can read from it.

A class is a colour of the segmentation; one that fills less than half a percent of a picture does not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from prompt_diffusion.data.dataset import InContextData, Side
from prompt_diffusion.data.families import encode_colors
from prompt_diffusion.data.held_out import BACKGROUND
from prompt_diffusion.evaluation.generate import hash_seed

MIN_SHARE: Final = 0.005
_ALIKE, _DIFFERENT = 40.0, 80.0  # distances of mean colours, in grey levels, that are below and above all doubt


@dataclass(frozen=True, slots=True)
class ExampleChoice:
    """The row that an example pair is taken from."""

    row: int
    """Its input side is shown."""
    is_covering: bool
    """Whether it shows every class of the query."""


@dataclass(frozen=True, slots=True)
class Distraction:
    """A query whose object has, in the photograph, the colour of another class's object in the example."""

    query_row: int
    """The query."""
    example_row: int
    """The example; it shows every class of the query."""
    class_code: int
    """The class of the query's object."""
    distractor_code: int
    """The class of the example's object that has its colour."""


def find_class_colors(data: InContextData, row: int, side: Side) -> dict[int, npt.NDArray[np.float64]]:
    """Return the mean colour (3,) in the photograph of each class that a picture shows, by the class's code."""
    codes, photograph = encode_colors(data.image(row, side, "seg")), data.image(row, side, None)
    found, counts = np.unique(codes, return_counts=True)
    return {
        int(code): photograph[codes == code].mean(axis=0)
        for code, count in zip(found, counts, strict=True)
        if count >= MIN_SHARE * codes.size
    }


def choose_covering_rows(data: InContextData, seed: int, rows: Iterable[int]) -> list[ExampleChoice]:
    """Return an example of each query, a function of (seed, sample id): drawn from the other prompt groups' rows that show
    every class of the query or, where there is none, from those that show most of them.

    ValueError where there is one prompt group only.
    """
    shown = _list_shown_colors(data)
    choices = []
    for row in rows:
        wanted = find_class_colors(data, row, "edited").keys()
        others = [other for other in range(data.num_rows) if data.group_ids[other] != data.group_ids[row]]
        if not others:
            raise ValueError(f"split {data.split!r} has one prompt group only: there is no other scene to show")
        missing = np.array([len(wanted - shown[other].keys()) for other in others])
        best = np.nonzero(missing == missing.min())[0]
        generator = np.random.default_rng(hash_seed(f"covering/{seed}/{data.sample_ids[row]}"))
        choices.append(ExampleChoice(others[int(generator.choice(best))], bool(missing.min() == 0)))
    return choices


def find_distractions(data: InContextData, seed: int, rows: Iterable[int]) -> list[Distraction]:
    """Return, of those queries that have one, an example that covers them and misleads by colour: drawn from all such.

    The query's object is coloured like another class's object in the example, and unlike its own class's there.
    """
    background = set(encode_colors(BACKGROUND).tolist())
    found = []
    for row in rows:
        wanted = find_class_colors(data, row, "edited")
        candidates = [
            Distraction(row, other, code, distractor)
            for other, colors in enumerate(_list_shown_colors(data))
            if data.group_ids[other] != data.group_ids[row] and wanted.keys() <= colors.keys()
            for code in wanted.keys() - background
            for distractor in colors.keys() - background - {code}
            if _measure(wanted[code], colors[distractor]) < _ALIKE and _measure(wanted[code], colors[code]) > _DIFFERENT
        ]
        if candidates:
            generator = np.random.default_rng(hash_seed(f"distraction/{seed}/{data.sample_ids[row]}"))
            found.append(candidates[int(generator.integers(len(candidates)))])
    return found


@lru_cache(maxsize=4)
def _list_shown_colors(data: InContextData) -> list[dict[int, npt.NDArray[np.float64]]]:
    """Return the classes that each row's example would show, with their colours; found once for all cases."""
    return [find_class_colors(data, row, "input") for row in range(data.num_rows)]


def _measure(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(one - other))
