"""The benchmark table: cells beside the paper's numbers and the trivial baselines, as JSON, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from prompt_diffusion.evaluation.cells import PAPER_VALUES, CellResult
from prompt_diffusion.evaluation.config import METHODS, Method
from prompt_diffusion.evaluation.in_context import NONE, InContextResult
from prompt_diffusion.evaluation.trivial import TrivialResult
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.manifest import MANIFEST_NAME, open_manifest
from prompt_diffusion.store.storage import list_files
from prompt_diffusion.store.uris import join_uri
from prompt_diffusion.vision_tasks import VISION_TASKS

STAGE: Final = "benchmark"
TABLE_FILE: Final = "table.json"
EXTRACTOR_TITLES: Final = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "inception": "Inception v3",
    "inception_legacy": "Inception v3, legacy resizing",
}
BASELINE_TITLES: Final = {
    "mean_map": "mean map of the training split",
    "copy_query": "copy the query",
    "copy_example_target": "copy the example's target",
}
_MISSING: Final = "-"


class BenchmarkTable(FrozenModel):
    """All numbers of one benchmark; what ``table.json`` holds."""

    cells: list[CellResult]
    """A number for each (method, vision task)."""
    trivial: list[TrivialResult]
    """What needs no model."""
    in_context: InContextResult
    """Which map comes out when the example pair alone decides."""
    seconds: dict[str, float]
    """By stage, in the run that made this table: a sealed stage costs its look-up, a resumed one what was left to do."""
    provenance: dict[str, Any]
    """When, from which fingerprints, with which configurations and library versions."""

    def find_cell(self, method: Method, vision_task: str) -> CellResult | None:
        """Return the cell of a method and vision task, None if there is none."""
        return next((c for c in self.cells if c.method == method and c.vision_task == vision_task), None)

    def find_trivial(self, baseline: str, vision_task: str) -> TrivialResult | None:
        """Return the trivial baseline of a vision task, None if there is none."""
        return next((t for t in self.trivial if t.baseline == baseline and t.vision_task == vision_task), None)

    @property
    def training(self) -> str:
        """The fingerprint of the joint model's training; empty if the table has none."""
        fingerprints: dict[str, str] = self.provenance.get("fingerprints", {})
        ours = (value for name, value in fingerprints.items() if name.startswith("model / Prompt Diffusion"))
        return next(ours, "")

    @property
    def vision_tasks(self) -> list[str]:
        """The vision tasks that have cells, in the order of the paper's table."""
        present = {cell.vision_task for cell in self.cells}
        return [name for name in VISION_TASKS if name in present]


class TableRow(FrozenModel):
    """One row of the table as people read it: a title and a text for each vision task."""

    kind: str
    """"measured", "floor", "trivial" or "paper"."""
    title: str
    """What the row is."""
    texts: list[str]
    """The numbers, rounded for reading; a dash where there is none."""
    is_best: list[bool]
    """Which of them are the lowest among the measured rows of a column."""


def describe_measure(cell: CellResult) -> str:
    """Return how a cell was measured, in words."""
    if cell.extractor is None:
        return f"RMSE, RGB in [0, 1], n = {cell.n}"
    title = EXTRACTOR_TITLES[cell.extractor]
    return (
        f"FID ({title}), n = {cell.n}"
        if cell.metric in ("FID", "FID_legacy")
        else f"Fréchet distance ({title}), n = {cell.n}"
    )


def name_task(vision_task: str) -> str:
    """Return a vision task as a header shows it: depth → image."""
    source, target = vision_task.split("_to_")
    return f"{source} → {target}".replace("hed", "HED")


def name_outcome(label: str) -> str:
    """Return what came out in the in-context test, as a header shows it."""
    return "photograph" if label == NONE else label.replace("hed", "HED")


def format_value(value: float | None, vision_task: str) -> str:
    """Return a number rounded as the paper rounds, with one digit more for RMSE; a dash for None."""
    if value is None:
        return _MISSING
    return f"{value:.3f}" if VISION_TASKS[vision_task].direction == "image_to_map" else f"{value:.2f}"


def build_rows(table: BenchmarkTable) -> list[TableRow]:
    """Return the table's rows: both methods, the floor, the trivial baselines, the paper's two."""
    tasks = table.vision_tasks
    rows = [_build_measured_row(table, method) for method in METHODS]
    floors = [max((c.floor for c in table.cells if c.vision_task == task), default=None) for task in tasks]
    rows.append(_build_row("floor", "floor (no generator)", floors, tasks))
    for baseline, title in BASELINE_TITLES.items():
        found = [table.find_trivial(baseline, task) for task in tasks]
        rows.append(_build_row("trivial", title, [None if t is None else t.value for t in found], tasks))
    rows += [
        _build_row("paper", f"{method}, paper", [PAPER_VALUES.get((method, task)) for task in tasks], tasks)
        for method in METHODS
    ]
    return rows


def render_markdown(table: BenchmarkTable) -> str:
    """Return the table as Markdown, with what was measured in its header and the in-context test below."""
    tasks = table.vision_tasks
    header = ["lower is better", *(f"{name_task(task)}<br>{_name_column(table, task)}" for task in tasks)]
    lines = [_join_cells(header), _join_cells(["---", *("---:" for _ in tasks)])]
    for row in build_rows(table):
        texts = [f"**{text}**" if best else text for text, best in zip(row.texts, row.is_best, strict=True)]
        lines.append(_join_cells([row.title, *texts]))
    lines += ["", *_describe_measures(table), "", *_render_confusion(table.in_context)]
    return "\n".join(lines) + "\n"


def render_csv(table: BenchmarkTable) -> str:
    """Return every number as CSV, unrounded: one line per cell, then one line per trivial baseline."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["kind", "method", "vision_task", "metric", "extractor", "value", "n", "floor", "paper"])
    for c in table.cells:
        paper = "" if c.paper is None else c.paper
        writer.writerow(["cell", c.method, c.vision_task, c.metric, c.extractor or "", c.value, c.n, c.floor, paper])
    for t in table.trivial:
        writer.writerow(["trivial", t.baseline, t.vision_task, t.metric, "", t.value, "", "", ""])
    return sink.getvalue()


def read_table(uri: str) -> BenchmarkTable:
    """Return the table of a sealed benchmark."""
    return BenchmarkTable.model_validate_json(open_manifest(uri).read_file(TABLE_FILE))


def find_newest_table(store_root: str, training: str | None = None) -> BenchmarkTable:
    """Return the newest table by its own time stamp, optionally of the training whose fingerprint begins so.

    ValueError where no benchmark is sealed, or none of that training; it names the trainings that have one.
    """
    root = join_uri(store_root, STAGE)
    folders = [
        path.removesuffix(f"/{MANIFEST_NAME}") for path in list_files(root) if path.endswith(f"/{MANIFEST_NAME}")
    ]
    if not folders:
        raise ValueError(f"there is no table in the store {store_root}: no benchmark is sealed there yet")
    tables = [read_table(join_uri(root, folder)) for folder in folders]
    if training is not None:
        trainings = sorted({table.training for table in tables})
        tables = [table for table in tables if table.training.startswith(training)]
        if not tables:
            raise ValueError(
                f"there is no table of training {training} in the store {store_root}: there are those of {', '.join(trainings)}"
            )
    return max(tables, key=lambda table: datetime.fromisoformat(table.provenance["created"]))


def _build_measured_row(table: BenchmarkTable, method: Method) -> TableRow:
    tasks = table.vision_tasks
    cells = [table.find_cell(method, task) for task in tasks]
    values = {task: [c.value for c in table.cells if c.vision_task == task] for task in tasks}
    row = _build_row(
        "measured", f"{method}, measured here", [None if cell is None else cell.value for cell in cells], tasks
    )
    # The lowest number means something only beside another.
    is_best = [
        cell is not None and cell.value == min(values[cell.vision_task]) < max(values[cell.vision_task])
        for cell in cells
    ]
    return row.model_copy(update={"is_best": is_best})


def _build_row(kind: str, title: str, values: Sequence[float | None], tasks: list[str]) -> TableRow:
    texts = [format_value(value, task) for value, task in zip(values, tasks, strict=True)]
    return TableRow(kind=kind, title=title, texts=texts, is_best=[False] * len(texts))


def _name_column(table: BenchmarkTable, vision_task: str) -> str:
    names = dict.fromkeys(describe_measure(cell) for cell in table.cells if cell.vision_task == vision_task)
    return " / ".join(names)


def _describe_measures(table: BenchmarkTable) -> list[str]:
    lines = ["The paper's map-to-image numbers are FID (Inception, legacy resizing, 10,000 images of 256 pixels)."]
    if any(cell.metric == "FID" for cell in table.cells):
        lines.append("An FID with clean-fid's resizing is another number, and does not compare with theirs.")
    if any(cell.metric == "frechet_distance" for cell in table.cells):
        lines.append(
            "A Fréchet distance with another extractor than Inception is not FID and cannot be set against them."
        )
    return lines


def _render_confusion(result: InContextResult) -> list[str]:
    shown = [label if label == NONE else name_outcome(label) for label in result.labels]
    return [
        f"In context, with no text: {100 * result.accuracy:.1f} % of outputs are the map that the example pair shows.",
        "",
        _join_cells(["pair shown", *(f"{name_outcome(label)} came out" for label in result.labels)]),
        _join_cells(["---", *("---:" for _ in result.labels)]),
        *(_join_cells([name, *map(str, row)]) for name, row in zip(shown, result.confusion, strict=True)),
    ]


def _join_cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
