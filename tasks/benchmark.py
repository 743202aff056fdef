"""The table and its report, as tasks: the stage, and what Prefect's page shows of it."""

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from prompt_diffusion.evaluation.benchmark import REPORT_FILE, identify_benchmark, run_benchmark
from prompt_diffusion.evaluation.table import read_table, render_markdown
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.storage import join_uri, local_path
from tasks.caching import DAY_SECONDS, build_stage_options


@task(name="benchmark", **build_stage_options(identify_benchmark, timeout_seconds=DAY_SECONDS))
def make_benchmark(
    cells: tuple[ManifestRef, ...],
    in_context: ManifestRef,
    trivial: ManifestRef,
    store: str,
    seconds: dict[str, float],
) -> ManifestRef:
    """Write the table and the report of everything that was measured."""
    return run_benchmark(cells, in_context, trivial, store, seconds=seconds)


@task(name="publish", persist_result=False)
def publish(benchmark: ManifestRef) -> None:
    """Show the table and a link to the report in Prefect's page (image artifacts would hold addresses only)."""
    table = read_table(benchmark.uri)
    create_markdown_artifact(render_markdown(table), key="benchmark-table", description="The paper's table, made here.")
    create_table_artifact([cell.model_dump() for cell in table.cells], key="benchmark-cells")
    report = join_uri(benchmark.uri, REPORT_FILE)
    folder = local_path(report)
    create_link_artifact(report if folder is None else folder.resolve().as_uri(), link_text="report", key="report")
