"""Stage ``unseen``: how good a model's answers are to what it never saw, beside those that need no model.

``floor`` is the truth after a round trip through the model's VAE.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.evaluation.cells import round_trip_images
from prompt_diffusion.evaluation.color_fit import compute_fitted_rmse
from prompt_diffusion.evaluation.config import EvaluateResources
from prompt_diffusion.evaluation.generate import Generations, check_makers
from prompt_diffusion.evaluation.generate_unseen import UnseenConfig, read_unseen
from prompt_diffusion.evaluation.rmse import ImageArray, compute_rmse
from prompt_diffusion.evaluation.unseen_answers import TRIVIAL, answer_trivially, judge_pixels
from prompt_diffusion.evaluation.unseen_cases import CaseQuery, Group, find_case
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.contact_sheet import Cells, draw_contact_sheet
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.stage import Context, Stage

logger = logging.getLogger(__name__)

VERSION: Final = 1
UNSEEN_FILE: Final = "unseen.json"
SHEET_FILE: Final = "unseen.png"
MODEL, FLOOR = "model", "floor"


class AnswerResult(FrozenModel):
    """How good one kind of answer is."""

    rmse: float = Field(ge=0.0, allow_inf_nan=False)
    """RGB in [0, 1], as published."""
    fitted_rmse: float = Field(ge=0.0, allow_inf_nan=False)
    """What is left after the best affine colour map of each answer to its truth."""
    right: float | None = Field(ge=0.0, le=1.0)
    """The share of the judged pixels whose colour stands for their class; None where colours stand for no class."""


class CaseResult(FrozenModel):
    """The answers to one case."""

    name: str
    """The case."""
    group: Group
    """The tier of its family, or what is odd about the example pair."""
    n: int = Field(ge=1)
    """Queries."""
    num_covered: int = Field(ge=0)
    """Queries whose example shows all of their classes."""
    answers: dict[str, AnswerResult]
    """The model's, those that need no model, and the floor."""

    @property
    def is_better(self) -> bool:
        """Whether the model's RMSE is below that of every answer that needs no model."""
        return self.answers[MODEL].rmse < min(self.answers[name].rmse for name in TRIVIAL)


class UnseenResult(FrozenModel):
    """All that was measured."""

    cases: list[CaseResult]
    """In the order in which they were asked."""
    switched: float | None
    """The share of object pixels that are right under both of two palettes, shown on the same example for the same query;
    None where the two were not asked."""

    def find_case(self, name: str) -> CaseResult | None:
        """Return the result of a case, None where it was not asked."""
        return next((case for case in self.cases if case.name == name), None)


@dataclass(frozen=True)
class MeasureUnseen(Stage[EvaluateResources]):
    """The stage: numbers of every case, sealed as ``unseen.json``, and a picture of each, ``unseen.png``.

    ValueError where the answers are not those of the model to these cases.
    """

    config: UnseenConfig
    generations: ManifestRef
    model: ManifestRef
    dataset: Dataset

    @property
    def title(self) -> str:
        """The name shown to people."""
        return "measure unseen families"

    def identify(self) -> StageIdentity:
        """Return what was asked, the answers, the model whose VAE gives the floor, and what they are compared with."""
        inputs = (
            StageInput.of("generations", self.generations),
            StageInput.of("model", self.model),
            *self.config.list_inputs(self.dataset),
        )
        config = self.config.model_dump(mode="json")
        return StageIdentity(stage="unseen", version=VERSION, config=config, inputs=inputs)

    def run(self, context: Context[EvaluateResources]) -> ManifestRef:
        """Measure, and seal numbers and picture."""
        self._check_generations()
        outputs = read_unseen(self.generations)
        results: list[CaseResult] = []
        right: dict[str, npt.NDArray[np.bool_]] = {}
        cells: list[Cells] = []
        for name in self.config.cases:
            queries, answers = self.config.build_queries(self.dataset, name), outputs[name]
            check_order(queries, answers)
            truths = np.stack([query.truth for query in queries])
            floor = round_trip_images(truths, self.model, context.resources)
            results.append(measure_case(name, queries, answers.images, floor))
            right[name] = judge_pixels(queries, answers.images)
            cells.append(_show(queries[0], answers.images[0]))
        result = UnseenResult(cases=results, switched=measure_switch(right))
        num_better = sum(case.is_better for case in results)
        logger.info("unseen: better than every answer without a model in %d of %d cases", num_better, len(results))
        sheet = draw_contact_sheet("What the model never saw", list(cells[0]), cells, [[case.name] for case in results])
        contents = {UNSEEN_FILE: json.dumps(result.model_dump(), indent=2).encode(), SHEET_FILE: sheet}
        files = [write_file(self.identity, context.store, path, data) for path, data in contents.items()]
        return seal_manifest(self.identity, context.store, files, counts={"rows": len(results)})

    def _check_generations(self) -> None:
        identity = open_manifest(self.generations.uri).identity
        if identity.config != self.config.model_dump(mode="json"):
            raise ValueError(
                f"{self.generations.uri} answers other cases or queries than those that are to be measured"
            )
        check_makers(identity, self.model, self.dataset.pairs)


def read_unseen_result(unseen: ManifestRef) -> UnseenResult:
    """Return the sealed numbers."""
    return UnseenResult.model_validate_json(open_manifest(unseen.uri).read_file(UNSEEN_FILE))


def measure_case(name: str, queries: Sequence[CaseQuery], outputs: ImageArray, floor: ImageArray) -> CaseResult:
    """Return the numbers of a case; ``outputs`` and ``floor``: uint8 (n, h, w, 3), in the order of the queries."""
    truths = np.stack([query.truth for query in queries])
    trivial = [answer_trivially(query) for query in queries]
    answers = {MODEL: outputs, **{kind: np.stack([each[kind] for each in trivial]) for kind in TRIVIAL}, FLOOR: floor}
    return CaseResult(
        name=name,
        group=find_case(name).group,
        n=len(queries),
        num_covered=sum(query.is_covering for query in queries),
        answers={
            kind: AnswerResult(
                rmse=compute_rmse(images, truths),
                fitted_rmse=compute_fitted_rmse(images, truths),
                right=None if queries[0].class_colors is None else float(judge_pixels(queries, images).mean()),
            )
            for kind, images in answers.items()
        },
    )


def measure_switch(right: Mapping[str, npt.NDArray[np.bool_]]) -> float | None:
    """Return the share of pixels that are right both under the new and under the switched palette; None without both."""
    if "new_palette" not in right or "switched_palette" not in right:
        return None
    return float((right["new_palette"] & right["switched_palette"]).mean())


def check_order(queries: Sequence[CaseQuery], answers: Generations) -> None:
    """Raise ValueError where answers are not those to the queries, in their order."""
    if [query.sample_id for query in queries] != answers.sample_ids:
        raise ValueError(
            f"the {len(answers)} images answer other queries than the {len(queries)} that are to be measured"
        )


def _show(query: CaseQuery, output: ImageArray) -> Cells:
    shown = {
        "example_source": query.example_source,
        "example_target": query.example_target,
        "query": query.query,
        "output": output,
        "truth": query.truth,
    }
    return {name: encode_png(image) for name, image in shown.items()}
