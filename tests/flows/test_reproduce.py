"""The whole method on the smoke preset: once made, nothing of it is made again."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.embedded import reproduce_here
from flows.evaluate import evaluate
from flows.reproduce import reproduce
from flows.run import start_run
from flows.stages import find_benchmark, find_models
from flows.train import train_six_task
from prompt_diffusion.evaluation.cells import read_cell
from prompt_diffusion.evaluation.table import BenchmarkTable, read_table
from prompt_diffusion.store.manifest import ManifestRef

# Two of the six vision tasks, so two baselines and four cells instead of six and twelve.
TWO_TASKS = {"train.vision_tasks": ["depth_to_image", "image_to_depth"]}

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, copy_smoke_inputs: Callable[[Path], str]) -> str:
    """Return the store that the tests of this module share, in their order; what is trained on is sealed already."""
    return copy_smoke_inputs(tmp_path_factory.mktemp("reproduce") / "store")


@pytest.fixture
def table(store: str) -> ManifestRef:
    """Return the table, made by the first test that asks for it."""
    return find_benchmark(start_run("smoke", TWO_TASKS, store)) or reproduce("smoke", TWO_TASKS, store)


def list_written(store: str) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file of a store."""
    files = (path for path in Path(store).rglob("*") if path.is_file())
    return {str(path.relative_to(store)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def list_sealed(store: str) -> set[str]:
    """Return stage and fingerprint of everything that is sealed."""
    return {str(path.parent.relative_to(store)) for path in Path(store).rglob("manifest.parquet")}


def test_a_table_is_made_with_a_cell_for_each_method_and_vision_task(table: ManifestRef) -> None:
    made: BenchmarkTable = read_table(table.uri)
    assert {(cell.method, cell.vision_task) for cell in made.cells} == {
        (method, task) for method in ("CN(FT)", "Prompt Diffusion") for task in ("depth_to_image", "image_to_depth")
    }
    assert set(made.seconds) == {"ingest", "annotate", "train", "baselines", "evaluate"}
    assert all(value > 0 for value in made.seconds.values())


def test_runs_on_prefects_page_are_called_by_what_they_do(table: ManifestRef) -> None:
    assert table.stage == "benchmark"
    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_flow_runs()}
    assert names >= {"reproduce smoke", "ingest", "annotate", "train", "baselines", "evaluate", "benchmark"}


def test_the_table_and_a_link_to_the_report_are_shown_in_prefects_page(table: ManifestRef) -> None:
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts()
    assert {"benchmark-table", "benchmark-cells", "report"} <= {artifact.key for artifact in shown}
    # the server is shared with other tests: among theirs is this report
    assert any(Path(table.uri, "report.html").as_uri() in str(artifact.data) for artifact in shown)


def test_a_second_run_writes_nothing_to_the_store(table: ManifestRef, store: str) -> None:
    before = list_written(store)
    assert reproduce("smoke", TWO_TASKS, store) == table
    assert list_written(store) == before


def test_a_finished_run_is_found_without_a_server(table: ManifestRef, store: str, tmp_path: Path) -> None:
    with temporary_settings(updates={PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert reproduce_here(start_run("smoke", TWO_TASKS, store), home=tmp_path / "home") == table
    assert not (tmp_path / "home").exists()


def test_one_changed_field_of_the_training_makes_only_that_training_again(table: ManifestRef, store: str) -> None:
    before = list_sealed(store)
    changed = {**TWO_TASKS, "train.optimizer.learning_rate": 0.0005}
    assert find_benchmark(start_run("smoke", changed, store)) is None
    model = train_six_task("smoke", changed, store, upstream="require")
    assert list_sealed(store) - before == {f"train/{model.fingerprint}"}


def test_a_deleted_manifest_is_made_again_whatever_prefect_remembers(table: ManifestRef, store: str) -> None:
    Path(table.uri, "manifest.parquet").unlink()
    assert reproduce("smoke", TWO_TASKS, store) == table
    assert Path(table.uri, "manifest.parquet").is_file()


def test_where_nothing_is_made_what_there_is_is_measured_and_the_rest_is_named(table: ManifestRef, store: str) -> None:
    other = TWO_TASKS | {"baselines.batch_size": 3}  # its baselines were never trained
    before = list_sealed(store)
    cells = [read_cell(cell) for cell in evaluate("smoke", other, store, upstream="require")]
    assert [(cell.method, cell.vision_task) for cell in cells] == [
        ("Prompt Diffusion", "depth_to_image"),
        ("Prompt Diffusion", "image_to_depth"),
    ]
    assert list_sealed(store) == before
    run = start_run("smoke", other, store, "require")
    assert find_models(run).list_missing(run) == ["CN(FT) depth_to_image", "CN(FT) image_to_depth"]
    untrained = TWO_TASKS | {"train.seed": 12345}
    with pytest.raises(ValueError, match=r"^stage 'train' is not sealed: Prompt Diffusion, .* is missing"):
        evaluate("smoke", untrained, store, upstream="require")
