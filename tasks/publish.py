"""Tasks that make nothing in the store: publishing finished stages on Prefect's page, and installing a base."""

import base64

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from prompt_diffusion.annotators.sheet import render_maps_sheet
from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation.benchmark import REPORT_FILE
from prompt_diffusion.evaluation.table import read_table, render_markdown
from prompt_diffusion.pretraining.stage import install_base
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.uris import join_uri, local_path


@task(name="publish maps", task_run_name="publish maps", persist_result=False)
def publish_maps(dataset: Dataset) -> None:
    """Show images beside their maps on Prefect's page (its image artifacts hold addresses only: the picture is inlined)."""
    picture = base64.b64encode(render_maps_sheet(dataset.pairs, dataset.maps)).decode()
    rows = "\n".join(f"| {name} | {ref.rows} | `{ref.uri}` |" for name, ref in dataset.maps.items())
    text = (
        f"| condition | pairs | manifest |\n|---|---|---|\n{rows}\n\n![condition maps](data:image/png;base64,{picture})"
    )
    create_markdown_artifact(text, key="condition-maps", description="The first images and their condition maps.")


@task(name="publish table", task_run_name="publish table", persist_result=False)
def publish_table(benchmark: ManifestRef) -> None:
    """Show the table and a link to the report on Prefect's page (image artifacts would hold addresses only)."""
    table = read_table(benchmark.uri)
    create_markdown_artifact(render_markdown(table), key="benchmark-table", description="The paper's table, made here.")
    create_table_artifact([cell.model_dump() for cell in table.cells], key="benchmark-cells")
    report = join_uri(benchmark.uri, REPORT_FILE)
    folder = local_path(report)
    create_link_artifact(report if folder is None else folder.resolve().as_uri(), link_text="report", key="report")


@task(name="install base", task_run_name="install base", persist_result=False)
def install(base: ManifestRef) -> str:
    """Put a base where this checkout looks up ``demo-base``."""
    return str(install_base(base))
