import csv
import io
import json
from typing import Any

import pytest
from pydantic import ValidationError

from prompt_diffusion.evaluation.cells import PAPER_VALUES, CellResult, build_cell_config
from prompt_diffusion.evaluation.config import METHODS
from prompt_diffusion.evaluation.in_context import InContextResult
from prompt_diffusion.evaluation.table import (
    STAGE,
    TABLE_FILE,
    BenchmarkTable,
    build_rows,
    find_newest_table,
    render_csv,
    render_markdown,
)
from prompt_diffusion.evaluation.trivial import TrivialResult
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.vision_tasks import VISION_TASKS


def build_table(extractor: str = "efficientnet_lite0", created: str = "2026-01-02T03:04:05+00:00") -> BenchmarkTable:
    cells = []
    for index, (method, task) in enumerate((method, task) for method in METHODS for task in VISION_TASKS):
        config = build_cell_config(method, task, extractor)  # type: ignore[arg-type]
        value, paper = 0.12345 + 0.01 * index, PAPER_VALUES[method, task]
        cells.append(CellResult(**config.model_dump(), value=value, n=75, floor=0.05, paper=paper))
    trivial = [
        TrivialResult.model_validate({"baseline": name, "vision_task": task, "value": 0.25})
        for task in ("image_to_depth", "image_to_hed", "image_to_seg")
        for name in ("mean_map", "copy_query", "copy_example_target")
    ]
    confusion = [[4, 0, 0, 0], [0, 3, 1, 0], [0, 0, 4, 0], [4, 0, 0, 0]]
    in_context = InContextResult(labels=["depth", "hed", "seg", "none"], confusion=confusion, accuracy=11 / 12)
    return BenchmarkTable(
        cells=cells, trivial=trivial, in_context=in_context, seconds={"train": 1.5}, provenance={"created": created}
    )


def test_json_has_exactly_the_promised_keys() -> None:
    content = json.loads(json.dumps(build_table().model_dump()))
    assert set(content) == {"cells", "trivial", "in_context", "seconds", "provenance"}
    cell_keys = {"method", "vision_task", "metric", "extractor", "value", "n", "floor", "paper"}
    assert all(set(cell) == cell_keys for cell in content["cells"])
    assert all(set(row) == {"baseline", "vision_task", "metric", "value"} for row in content["trivial"])
    assert set(content["in_context"]) == {"labels", "confusion", "accuracy"}
    assert {cell["method"] for cell in content["cells"]} == {"CN(FT)", "Prompt Diffusion"}
    assert BenchmarkTable.model_validate(content) == build_table()


def test_csv_has_every_number_of_the_json_unrounded() -> None:
    table = build_table()
    rows = list(csv.DictReader(io.StringIO(render_csv(table))))
    cells = [row for row in rows if row["kind"] == "cell"]
    for row, cell in zip(cells, table.cells, strict=True):
        numbers = [float(row[name]) for name in ("value", "n", "floor", "paper")]
        assert numbers == [cell.value, cell.n, cell.floor, cell.paper]
        assert [row[name] for name in ("method", "vision_task", "metric")] == [
            cell.method,
            cell.vision_task,
            cell.metric,
        ]
        assert row["extractor"] == (cell.extractor or "")
    trivial = [row for row in rows if row["kind"] == "trivial"]
    assert [(row["method"], float(row["value"])) for row in trivial] == [(t.baseline, t.value) for t in table.trivial]


def test_markdown_has_the_numbers_of_the_json_rounded() -> None:
    table = build_table()
    lines = render_markdown(table).splitlines()
    header = [text.strip().split("<br>")[0] for text in lines[0].strip("|").split("|")]
    assert header[1:] == ["depth → image", "HED → image", "seg → image", "image → depth", "image → HED", "image → seg"]
    by_title = {
        line.split("|")[1].strip(): [t.strip(" *") for t in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    for method in METHODS:
        values = [cell.value for task in VISION_TASKS if (cell := table.find_cell(method, task)) is not None]
        shown = [float(text) for text in by_title[f"{method}, measured here"]]
        assert shown == pytest.approx(values, abs=0.0051)
        assert [float(text) for text in by_title[f"{method}, paper"]] == [PAPER_VALUES[method, t] for t in VISION_TASKS]
    assert by_title["copy the query"] == ["-", "-", "-", "0.250", "0.250", "0.250"]
    assert by_title["depth"] == ["4", "0", "0", "0"]
    assert "91.7 %" in render_markdown(table)


@pytest.mark.parametrize("extractor", ["efficientnet_lite0", "inception"])
def test_headers_name_extractor_and_n_and_say_fid_for_inception_alone(extractor: str) -> None:
    header = render_markdown(build_table(extractor)).splitlines()[0]
    assert "n = 75" in header
    assert ("FID (Inception v3)" in header, "FID" in header) == (extractor == "inception",) * 2
    assert ("Fréchet distance (EfficientNet-Lite0)" in header) == (extractor == "efficientnet_lite0")


def test_best_is_the_lower_of_two_and_nothing_alone() -> None:
    table = build_table()
    cn_ft, prompt_diffusion = build_rows(table)[:2]
    assert (cn_ft.is_best, prompt_diffusion.is_best) == ([True] * 6, [False] * 6)
    alone = table.model_copy(update={"cells": [cell for cell in table.cells if cell.method == "CN(FT)"]})
    assert build_rows(alone)[0].is_best == [False] * 6
    assert build_rows(alone)[1].texts == ["-"] * 6


@pytest.mark.parametrize("change", [{"value": float("nan")}, {"value": -0.1}, {"metric": "FID"}, {"n": 0}])
def test_impossible_cells_are_refused(change: dict[str, Any]) -> None:
    cell = build_table().cells[0].model_dump()
    with pytest.raises(ValidationError):
        CellResult.model_validate({**cell, **change})


def seal_table(store: str, created: str, training: str = "0" * 32) -> None:
    identity = StageIdentity(stage=STAGE, version=1, config={"created": created}, inputs=())
    table = build_table(created=created)
    table.provenance["fingerprints"] = {"model / CN(FT)": "f" * 32, "model / Prompt Diffusion": training}
    data = json.dumps(table.model_dump()).encode()
    seal_manifest(identity, store, [write_file(identity, store, TABLE_FILE, data)], counts={"rows": 12})


def test_the_newest_table_is_found_by_the_time_it_says(store_root: str) -> None:
    for created in ("2026-03-01T00:00:00+00:00", "2026-05-01T00:00:00+00:00", "2026-04-01T00:00:00+00:00"):
        seal_table(store_root, created)
    assert find_newest_table(store_root).provenance["created"] == "2026-05-01T00:00:00+00:00"


def test_another_model_s_table_is_found_by_its_training(tmp_store: str) -> None:
    seal_table(tmp_store, "2026-03-01T00:00:00+00:00", "a" * 32)
    seal_table(tmp_store, "2026-05-01T00:00:00+00:00", "b" * 32)
    assert find_newest_table(tmp_store).training == "b" * 32
    assert find_newest_table(tmp_store, "aaaa").training == "a" * 32
    with pytest.raises(ValueError, match=f"no table of training cccc .*: there are those of {'a' * 32}, {'b' * 32}"):
        find_newest_table(tmp_store, "cccc")


def test_a_store_without_a_table_says_so(tmp_store: str) -> None:
    with pytest.raises(ValueError, match="no benchmark is sealed"):
        find_newest_table(tmp_store)


def test_an_unsealed_table_does_not_count(tmp_store: str) -> None:
    seal_table(tmp_store, "2026-03-01T00:00:00+00:00")
    unfinished = StageIdentity(stage=STAGE, version=1, config={}, inputs=())
    write_file(unfinished, tmp_store, TABLE_FILE, b"{}")
    assert find_newest_table(tmp_store).provenance["created"] == "2026-03-01T00:00:00+00:00"
