"""What a model is asked that it never saw: held-out families, and example pairs that mislead or do not fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from prompt_diffusion.data.dataset import InContextData, Side
from prompt_diffusion.data.families import IMAGE, encode_colors
from prompt_diffusion.data.held_out import BACKGROUND, HELD_OUT, MISALIGNMENTS, NUM_MEMBERS
from prompt_diffusion.data.target_functions import Pictures, TargetFunction
from prompt_diffusion.evaluation.coverage import choose_covering_rows, find_distractions
from prompt_diffusion.evaluation.rmse import ImageArray

Group = Literal["new_draw", "composition", "unseen", "counterfactual", "adversarial", "misaligned"]

KNOWN_CONDITIONS: Final = ("depth", "hed", "seg")
"""The trained maps that an answer may be mistaken for; every dataset that cases are built of has them."""
_MIN_CHANGE = 0.02  # the share of a query's pixels that a member must change, else the next one is asked for
_OTHER_SCENE = "other_scene"


@dataclass(frozen=True)
class UnseenCase:
    """One thing that is asked of every query."""

    group: Group
    """A held-out family's tier, or what is odd about the example pair."""
    family: str
    """A held-out family; of misaligned pairs a condition, whose map is the truth."""
    first_member: int = 0
    """The family's member that the first query is asked for."""
    misalignment: str | None = None
    """What is done to the example's target, and not to its source."""

    @property
    def conditions(self) -> frozenset[str]:
        """The condition maps that the case is built of."""
        sources = HELD_OUT[self.family].sources if self.family in HELD_OUT else (self.family,)
        return frozenset((*sources, *KNOWN_CONDITIONS)) - {IMAGE}

    @property
    def is_of_classes(self) -> bool:
        """Whether a pixel's colour depends on its class alone, so that an answer can be judged pixel by pixel."""
        return self.family in HELD_OUT and HELD_OUT[self.family].sources == ("seg",)

    def choose_function(self, position: int, query: Pictures) -> TargetFunction:
        """Return what is asked of a query: its member of the family or, where that changes next to nothing, a next one."""
        if self.family not in HELD_OUT:
            return lambda pictures: pictures[self.family]
        family = HELD_OUT[self.family]
        for number in range(family.num_members):
            function = family.member(self.first_member + position + number)
            if (function(query) != query[IMAGE]).any(axis=2).mean() >= _MIN_CHANGE:
                return function
        return family.member(self.first_member + position)


CASES: Final[dict[str, UnseenCase]] = {
    **{name: UnseenCase(family.tier, name) for name, family in HELD_OUT.items()},
    "switched_palette": UnseenCase("counterfactual", "new_palette", first_member=NUM_MEMBERS // 2),
    "distracting_palette": UnseenCase("adversarial", "new_palette"),
    **{
        f"{name}_depth": UnseenCase("misaligned", "depth", misalignment=name) for name in (*MISALIGNMENTS, _OTHER_SCENE)
    },
}
"""All cases, by name. ``switched_palette`` asks for other palettes than ``new_palette``, of the same queries and examples."""


def find_case(name: str) -> UnseenCase:
    """Return a case; ValueError lists those that there are."""
    if name not in CASES:
        raise ValueError(f"unknown case {name!r}: choose from {', '.join(CASES)}")
    return CASES[name]


@dataclass(frozen=True)
class CaseQuery:
    """One query of a case; images are uint8 (h, w, 3)."""

    sample_id: str
    example_source: ImageArray
    example_target: ImageArray
    query: ImageArray
    truth: ImageArray
    known: Mapping[str, tuple[ImageArray, ImageArray]]
    """The trained answers, the photograph among them: the example's and the query's."""
    class_colors: ImageArray | None
    """What the function makes of each class of the segmentation, (classes, 3); None where it is no function of classes."""
    judged: npt.NDArray[np.bool_]
    """The pixels of objects (h, w); of an adversarial case those of the object that the example distracts from."""
    is_covering: bool
    """Whether the example shows every class of the query."""


@dataclass(frozen=True)
class CaseRows:
    """Builds a case's queries from the rows of a split, one after the other."""

    data: InContextData
    seed: int
    """Of the choice of examples."""

    @cached_property
    def classes(self) -> ImageArray:
        """The colours of the segmentations of the split's queries, (classes, 3)."""
        codes = {int(code) for row in range(self.data.num_rows) for code in np.unique(self._encode(row))}
        return np.array([[code >> 16, code >> 8 & 255, code & 255] for code in sorted(codes)], np.uint8)

    def build(self, case: UnseenCase, rows: Iterable[int]) -> list[CaseQuery]:
        """Return the queries of a case: of an adversarial one, those of the rows that have a distracting example.

        ValueError where none has one.
        """
        rows = list(rows)
        if case.group == "adversarial":
            distractions = find_distractions(self.data, self.seed, rows)
            if not distractions:
                raise ValueError(
                    f"none of the {len(rows)} queries has an example that misleads by colour: take more queries"
                )
            return [
                self._build(case, rows.index(each.query_row), each.query_row, each.example_row, True, each.class_code)
                for each in distractions
            ]
        choices = choose_covering_rows(self.data, self.seed, rows)
        return [
            self._build(case, position, row, choice.row, choice.is_covering, None)
            for position, (row, choice) in enumerate(zip(rows, choices, strict=True))
        ]

    def _build(
        self, case: UnseenCase, position: int, row: int, example_row: int, is_covering: bool, judged_class: int | None
    ) -> CaseQuery:
        example, query = self._read(case, example_row, "input"), self._read(case, row, "edited")
        function, codes = case.choose_function(position, query), self._encode(row)
        is_object = ~np.isin(codes, encode_colors(BACKGROUND))
        return CaseQuery(
            sample_id=self.data.sample_ids[row],
            example_source=example[IMAGE],
            example_target=self._misalign(case, function, example_row, example),
            query=query[IMAGE],
            truth=function(query),
            known={name: (example[name], query[name]) for name in (IMAGE, *KNOWN_CONDITIONS)},
            class_colors=function({"seg": self.classes[None]})[0] if case.is_of_classes else None,
            judged=is_object if judged_class is None else codes == judged_class,
            is_covering=is_covering,
        )

    def _misalign(self, case: UnseenCase, function: TargetFunction, example_row: int, example: Pictures) -> ImageArray:
        if case.misalignment == _OTHER_SCENE:
            [other] = choose_covering_rows(self.data, self.seed + 1, [example_row])
            return function(self._read(case, other.row, "input"))
        target = function(example)
        return target if case.misalignment is None else MISALIGNMENTS[case.misalignment](target)

    def _read(self, case: UnseenCase, row: int, side: Side) -> Pictures:
        maps = {name: self.data.image(row, side, name) for name in sorted(case.conditions)}
        return {IMAGE: self.data.image(row, side, None), **maps}

    def _encode(self, row: int) -> npt.NDArray[np.int64]:
        return encode_colors(self.data.image(row, "edited", "seg"))
