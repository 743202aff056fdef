"""The report: one HTML file with the table, the in-context test, the pictures, the curves and the provenance."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation.config import Method
from prompt_diffusion.evaluation.curves import count_samples, draw_curves, read_curve
from prompt_diffusion.evaluation.findings import list_caveats, list_facts, list_findings
from prompt_diffusion.evaluation.in_context import NONE, SHOWN_TASKS, InContextResult
from prompt_diffusion.evaluation.pictures import build_in_context_grid, build_task_grid
from prompt_diffusion.evaluation.provenance import CellSources
from prompt_diffusion.evaluation.table import (
    BenchmarkTable,
    build_rows,
    describe_measure,
    name_outcome,
    name_task,
)
from prompt_diffusion.store.lineage import open_input
from prompt_diffusion.store.manifest import Manifest
from prompt_diffusion.vision_tasks import VISION_TASKS

TEMPLATE: Final = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class ColumnGroup:
    """Neighbouring columns of the table that are measured alike."""

    title: str
    measure: str
    num_columns: int


@dataclass(frozen=True, slots=True)
class ConfusionRow:
    """One row of the heat table: what was shown, and for each label the count and its share of the row."""

    title: str
    counts: list[int]
    shares: list[float]
    right: int | None
    """The column that a model that reads the pair would fill; None where no pair was shown."""


def render_report(table: BenchmarkTable, sources: Sequence[CellSources], in_context: Manifest) -> str:
    """Return the HTML of a benchmark, self-contained: a function of the table and of the sealed manifests behind it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    tasks = table.vision_tasks
    by_task: dict[str, dict[Method, CellSources]] = {task: {} for task in tasks}
    for source in sources:
        by_task[source.result.vision_task][source.result.method] = source
    pairs = sources[0].pairs
    maps = {condition: open_input(in_context, f"maps/{condition}").ref for condition in SHOWN_TASKS}
    dataset = Dataset(pairs=pairs.ref, maps=maps)
    curves = {(s.result.method, s.result.vision_task): read_curve(s.model, s.result.vision_task) for s in sources}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        table=table,
        facts=list_facts(table, sources, count_samples(curves)),
        findings=list_findings(table),
        caveats=list_caveats(table),
        groups=group_columns(table),
        headings=[name_task(task) for task in tasks],
        rows=build_rows(table),
        confusion=shade_confusion(table.in_context),
        labels=[name_outcome(label) for label in table.in_context.labels],
        in_context_grid=build_in_context_grid(in_context, dataset),
        curves=draw_curves(curves, tasks),
        grids=[build_task_grid(by_task[task], dataset) for task in tasks],
        size=grids_size(pairs),
        provenance={
            name: json.dumps(value, indent=2, ensure_ascii=False)
            for name, value in table.provenance.items()
            if name not in ("created", "fingerprints", "versions")
        },
    )


def group_columns(table: BenchmarkTable) -> list[ColumnGroup]:
    """Return the table's column groups: runs of vision tasks of one direction, with metric, extractor and n."""
    groups: list[ColumnGroup] = []
    for task in table.vision_tasks:
        cells = [cell for cell in table.cells if cell.vision_task == task]
        title = VISION_TASKS[task].direction.replace("_", " ")
        measure = " / ".join(dict.fromkeys(describe_measure(cell) for cell in cells))
        if groups and (groups[-1].title, groups[-1].measure) == (title, measure):
            groups[-1] = ColumnGroup(title, measure, groups[-1].num_columns + 1)
        else:
            groups.append(ColumnGroup(title, measure, 1))
    return groups


def shade_confusion(result: InContextResult) -> list[ConfusionRow]:
    """Return the confusion matrix with each count's share of its row."""
    rows = []
    for index, (label, counts) in enumerate(zip(result.labels, result.confusion, strict=True)):
        title = "no pair" if label == NONE else f"{name_outcome(label)} pair"
        total = max(sum(counts), 1)
        rows.append(ConfusionRow(title, counts, [c / total for c in counts], None if label == NONE else index))
    return rows


def grids_size(pairs: Manifest) -> int:
    """Return the side of the pictures in pixels, as they were ingested."""
    return int(pairs.identity.config["image_size"])
