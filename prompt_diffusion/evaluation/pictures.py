"""The report's pictures: for each vision task, what was shown, what came out, and the truth."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np

from prompt_diffusion.data.dataset import Dataset, InContextData, Side
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.evaluation.config import METHODS, Method
from prompt_diffusion.evaluation.generate import Generations, choose_example_rows, open_data, read_generations
from prompt_diffusion.evaluation.in_context import NONE, SHOWN_TASKS, find_nearest
from prompt_diffusion.evaluation.provenance import CellSources
from prompt_diffusion.evaluation.rmse import ImageArray, compute_image_errors
from prompt_diffusion.evaluation.table import name_outcome, name_task
from prompt_diffusion.store.lineage import open_input
from prompt_diffusion.store.manifest import Manifest
from prompt_diffusion.vision_tasks import find_vision_task

Name = TypeVar("Name", bound=str)

NUM_COLUMNS: Final = 8
NUM_WORST: Final = 2
# Small pictures are shown enlarged, pixel for pixel; larger ones are photographs to a browser, and cost less as JPEG.
MAX_PIXELATED: Final = 128


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One row of a grid: what it shows, and a picture (a data URI) and a note for each column."""

    title: str
    images: list[str]
    notes: list[str] = field(default_factory=list)
    is_output: bool = False


@dataclass(frozen=True, slots=True)
class PictureGrid:
    """Pictures of one vision task: one column per query."""

    title: str
    headings: list[str]
    rows: list[PictureRow]
    captions: list[str] = field(default_factory=list)


def encode_data_uri(image: ImageArray) -> str:
    """Return a picture (h, w, 3) as a data URI: PNG up to 128 pixels, JPEG above."""
    if max(image.shape[:2]) <= MAX_PIXELATED:
        return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"


def build_task_grid(cells: Mapping[Method, CellSources], dataset: Dataset) -> PictureGrid:
    """Return the pictures of one vision task, of which at least one method has a cell.

    Columns are the first test images, not chosen; for image to map the last two are Prompt Diffusion's worst.
    """
    reference = cells.get("Prompt Diffusion") or next(iter(cells.values()))
    task = find_vision_task(reference.result.vision_task)
    config = reference.generations.identity.config
    data = open_data(dataset, config["split"])
    generations = {method: read_generations(cells[method].generations.ref) for method in METHODS if method in cells}
    queries = data.find_rows(read_shared_ids(generations))
    outputs = {method: answers.images for method, answers in generations.items()}
    truths = np.stack([data.image(row, "edited", task.target_condition) for row in queries])
    errors = {method: np.sqrt(compute_image_errors(images, truths)) for method, images in outputs.items()}
    is_map = task.direction == "image_to_map"
    columns, num_worst = _choose_columns(errors[reference.result.method] if is_map else None, len(truths))
    shown = [queries[column] for column in columns]
    rows = _show_example(data, config, task.source_condition, task.target_condition, shown)
    rows.append(PictureRow("query", [_show(data, row, "edited", task.source_condition) for row in shown]))
    for method, images in outputs.items():
        notes = [f"{errors[method][row]:.3f}" for row in columns] if is_map else []
        rows.append(PictureRow(method, [encode_data_uri(images[row]) for row in columns], notes, is_output=True))
    rows.append(PictureRow("truth", [encode_data_uri(truths[row]) for row in columns]))
    first = len(columns) - num_worst
    headings = [f"{row + 1}" if index < first else f"worst: {row + 1}" for index, row in enumerate(columns)]
    captions = [] if is_map else [data.captions("edited")[row] for row in shown]
    return PictureGrid(name_task(task.name), headings, rows, captions)


def build_in_context_grid(in_context: Manifest, dataset: Dataset) -> PictureGrid:
    """Return the same queries with each example pair and without one, and what each output was counted as."""
    data = open_data(dataset, in_context.identity.config["split"])
    shown = {name: read_generations(open_input(in_context, f"shown/{name}").ref) for name in (*SHOWN_TASKS, NONE)}
    columns = data.find_rows(read_shared_ids(shown))[:NUM_COLUMNS]
    truths = {name: np.stack([data.image(row, "edited", name) for row in columns]) for name in SHOWN_TASKS}
    truths[NONE] = np.stack([data.image(row, "edited", None) for row in columns])
    rows = [PictureRow("query", [_show(data, row, "edited", None) for row in columns])]
    for name, generations in shown.items():
        images = generations.images[: len(columns)]
        notes = [name_outcome(list(truths)[index]) for index in find_nearest(images, truths)]
        title = "no pair" if name == NONE else f"pair shows {name_outcome(name)}"
        rows.append(PictureRow(title, [encode_data_uri(image) for image in images], notes, is_output=True))
    return PictureGrid("same query, no text", [f"{column + 1}" for column in range(len(columns))], rows)


def read_shared_ids(generations: Mapping[Name, Generations]) -> list[str]:
    """Return the samples that all of these images answer, in order; ValueError where two differ."""
    (first, reference), *others = generations.items()
    for name, other in others:
        if other.sample_ids != reference.sample_ids:
            raise ValueError(f"the images of {name!r} answer other queries than those of {first!r}")
    return reference.sample_ids


def _choose_columns(errors: np.ndarray[tuple[int], np.dtype[np.float64]] | None, n: int) -> tuple[list[int], int]:
    """Return the rows to show, and how many at the end are shown because they are the worst."""
    if errors is None or n <= NUM_COLUMNS:
        return list(range(min(n, NUM_COLUMNS))), 0
    first = list(range(NUM_COLUMNS - NUM_WORST))
    worst = [int(row) for row in np.argsort(-errors, kind="stable") if row not in first][:NUM_WORST]
    return first + worst, NUM_WORST


def _show_example(
    data: InContextData, config: Mapping[str, object], source: str | None, target: str | None, columns: Sequence[int]
) -> list[PictureRow]:
    """Return the example pairs of those queries; none where the images were made without a pair."""
    policy, seed = config["example_policy"], config["seed"]
    if policy is None:
        return []
    assert policy in ("same_group", "same_row", "other_group")
    assert isinstance(seed, int)
    rows = choose_example_rows(data, policy, seed, columns)
    return [
        PictureRow("example source", [_show(data, row, "input", source) for row in rows]),
        PictureRow("example target", [_show(data, row, "input", target) for row in rows]),
    ]


def _show(data: InContextData, row: int, side: Side, condition: str | None) -> str:
    return encode_data_uri(data.image(row, side, condition))
