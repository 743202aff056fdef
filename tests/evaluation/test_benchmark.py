"""The whole evaluation of two untrained models, to the report."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation import benchmark
from prompt_diffusion.evaluation.benchmark import Benchmark
from prompt_diffusion.evaluation.cells import MeasureCell, build_cell_config
from prompt_diffusion.evaluation.config import METHODS, EvaluateConfig, EvaluateResources
from prompt_diffusion.evaluation.curves import draw_curves, read_curve
from prompt_diffusion.evaluation.findings import compute_interval
from prompt_diffusion.evaluation.generate import Generate, build_generate_config
from prompt_diffusion.evaluation.in_context import MeasureInContext, build_shown_configs
from prompt_diffusion.evaluation.pictures import encode_data_uri
from prompt_diffusion.evaluation.table import find_newest_table, read_table, render_csv, render_markdown
from prompt_diffusion.evaluation.trivial import MeasureTrivial, build_trivial_config
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.store.storage import delete_folder, read_bytes
from prompt_diffusion.vision_tasks import VISION_TASKS

Parts = tuple[tuple[ManifestRef, ...], ManifestRef, ManifestRef]


@pytest.fixture(scope="module")
def parts(
    config: EvaluateConfig,
    joint: ManifestRef,
    baseline: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
) -> Parts:
    """Return the sealed cells of both methods and all vision tasks, the in-context test and the trivial baselines."""
    cells = []
    for method in METHODS:
        model = joint if method == "Prompt Diffusion" else baseline
        for task in VISION_TASKS:
            images = obtain(
                Generate(build_generate_config(config, method, task), model, dataset),
                Context(store, resources),
            )
            cell_config = build_cell_config(method, task, "efficientnet_lite0")
            cells.append(obtain(MeasureCell(cell_config, images, model, dataset), Context(store, resources)))
    shown = {
        name: obtain(Generate(each, joint, dataset), Context(store, resources))
        for name, each in build_shown_configs(config).items()
    }
    in_context = obtain(MeasureInContext(config.split, shown, dataset), Context(store, None))
    return (
        tuple(cells),
        in_context,
        obtain(MeasureTrivial(build_trivial_config(config), dataset), Context(store, None)),
    )


@pytest.fixture(scope="module")
def sealed(parts: Parts, store: str) -> ManifestRef:
    return obtain(Benchmark(*parts, {"train": 12.3456, "evaluate": 4.0}), Context(store, None))


class Resources(HTMLParser):
    """Collects what a page would load, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_the_report_is_one_file_without_scripts_or_external_resources(sealed: ManifestRef) -> None:
    html = open_manifest(sealed.uri).read_file("report.html").decode()
    page = Resources()
    page.feed(html)
    assert all(link.startswith(("data:image/", "#")) for link in page.links), page.links
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    # 6 vision tasks x 6 rows x 8 columns, and 5 rows of the in-context test x 4 queries
    assert page.tags.count("img") == 6 * 8 * 6 + 5 * 4
    assert "svg" in page.tags


def test_the_report_says_extractor_n_floor_and_that_it_is_not_fid(sealed: ManifestRef) -> None:
    html = open_manifest(sealed.uri).read_file("report.html").decode()
    floor = read_table(sealed.uri).cells[0].floor
    for text in ("Fréchet distance (EfficientNet-Lite0), n = 10", "is not FID", f"{floor:.2f}", "other_group"):
        assert text in html, text
    assert sealed.fingerprint not in html, "a page cannot name its own digest"


def test_json_markdown_and_csv_are_of_one_table(sealed: ManifestRef) -> None:
    manifest = open_manifest(sealed.uri)
    table = read_table(sealed.uri)
    assert {file.path for file in manifest.files} == {"report.html", "table.md", "table.csv", "table.json"}
    assert manifest.read_file("table.md").decode() == render_markdown(table)
    assert manifest.read_file("table.csv").decode() == render_csv(table)
    assert table.seconds == {"train": 12.346, "evaluate": 4.0}
    assert len(table.cells) == 12
    json.loads(manifest.read_file("table.json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_provenance_names_every_input_and_configuration(sealed: ManifestRef, parts: Parts, joint: ManifestRef) -> None:
    provenance: dict[str, Any] = read_table(sealed.uri).provenance
    fingerprints = set(provenance["fingerprints"].values())
    cells, in_context, trivial = parts
    assert {ref.fingerprint for ref in (*cells, in_context, trivial, joint)} <= fingerprints
    assert provenance["data"]["source"]["kind"] == "scenes"
    assert provenance["generate"]["Prompt Diffusion / image_to_seg"]["example_policy"] == "other_group"
    assert len(provenance["extractor"]["efficientnet_lite0"]) == 64
    assert "torch" in provenance["versions"]


def test_seconds_do_not_move_the_fingerprint_and_a_rerun_writes_nothing(
    sealed: ManifestRef, parts: Parts, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "render_report", None)
    assert obtain(Benchmark(*parts, {"train": 99.0}), Context(store, None)) == sealed
    assert find_newest_table(store).seconds["train"] == 12.346


def test_a_killed_run_ends_with_the_first_runs_table(
    sealed: ManifestRef, parts: Parts, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.path: file.sha256 for file in open_manifest(sealed.uri).files}
    table = read_bytes(f"{sealed.uri}/table.json")
    delete_folder(sealed.uri)

    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "render_report", kill)
        with pytest.raises(KilledError):
            obtain(Benchmark(*parts, {"train": 12.3456, "evaluate": 4.0}), Context(store, None))
    left = read_bytes(f"{sealed.uri}/table.json")
    assert json.loads(left)["cells"] == json.loads(table)["cells"]
    assert obtain(Benchmark(*parts, {"train": 1.0}), Context(store, None)) == sealed
    assert read_bytes(f"{sealed.uri}/table.json") == left
    # Beside the time stamp, nothing depends on the run.
    after = {file.path: file.sha256 for file in open_manifest(sealed.uri).files}
    assert after["table.csv"] == before["table.csv"]
    assert after["table.md"] == before["table.md"]


def test_the_same_table_renders_to_the_same_report(sealed: ManifestRef, parts: Parts, store: str) -> None:
    html = open_manifest(sealed.uri).read_file("report.html")
    table = read_table(sealed.uri)
    sources = [benchmark.trace_cell(cell) for cell in parts[0]]
    again = benchmark.render_report(table, sources, open_manifest(parts[1].uri))
    assert again.encode() == html


def test_two_cells_for_one_place_are_refused(parts: Parts) -> None:
    cells, in_context, trivial = parts
    with pytest.raises(ValueError, match=r"two inputs in the role .cells/CN\(FT\)/depth_to_image."):
        Benchmark((*cells, cells[0]), in_context, trivial).identify()
    with pytest.raises(ValueError, match="at least one cell"):
        Benchmark((), in_context, trivial).identify()


def test_every_input_moves_the_fingerprint(parts: Parts) -> None:
    cells, in_context, trivial = parts
    identities = [
        Benchmark(cells, in_context, trivial).identity,
        Benchmark(cells[1:], in_context, trivial).identity,
        Benchmark(cells, trivial, trivial).identity,
        Benchmark(cells, in_context, in_context).identity,
    ]
    assert len({identity.fingerprint for identity in identities}) == 4
    assert Benchmark(cells[::-1], in_context, trivial).identity.fingerprint == identities[0].fingerprint


def test_a_part_of_the_table_makes_a_report(parts: Parts, store: str) -> None:
    """The joint model alone, or a few vision tasks, are reported as what they are."""
    cells, in_context, trivial = parts
    ref = obtain(Benchmark(cells[6:8], in_context, trivial), Context(store, None))
    html = open_manifest(ref.uri).read_file("report.html").decode()
    assert "HED → image" in html
    assert "image → seg</h3>" not in html
    assert "CN(FT) is lower" not in html


def test_loss_curves_are_weighted_means_over_the_samples_of_a_vision_task(joint: ManifestRef) -> None:
    model = open_manifest(joint.uri)
    seen, losses = read_curve(model, "image_to_hed")
    assert seen[-1] == 200
    assert len(seen) == len(losses) <= 40
    assert np.all(np.diff(seen) > 0)
    assert np.all(np.diff(losses) < 0), "the losses of this model fall"
    table = pq.read_table(pa.BufferReader(model.read_file("losses.parquet")))
    first = table["loss"].to_numpy()[:6]
    assert losses[0] == pytest.approx(first[0])
    assert draw_curves({("Prompt Diffusion", "image_to_hed"): (seen, losses)}, ["image_to_hed"]).startswith("<svg")


def test_large_pictures_are_jpeg_and_small_ones_exact() -> None:
    assert encode_data_uri(np.zeros((64, 64, 3), np.uint8)).startswith("data:image/png;base64,")
    assert encode_data_uri(np.zeros((256, 256, 3), np.uint8)).startswith("data:image/jpeg;base64,")


def test_intervals_of_shares_stay_within_reason() -> None:
    low, high = compute_interval(144, 144)
    assert (round(low, 4), high) == (0.974, 1.0)
    low, high = compute_interval(5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)  # the textbook value of Wilson's interval
