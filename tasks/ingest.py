"""Image pairs from a source, as a task."""

from prefect import task

from prompt_diffusion.data.ingest import IngestConfig, identify_ingest, run_ingest
from prompt_diffusion.store.manifest import ManifestRef
from tasks.caching import DAY_SECONDS, build_stage_options
from tasks.progress import log_progress


@task(
    name="ingest",
    task_run_name="ingest {config.source.kind}",
    **build_stage_options(identify_ingest, timeout_seconds=7 * DAY_SECONDS),
)
def ingest(config: IngestConfig, store: str) -> ManifestRef:
    """Read the source into sealed image pairs."""
    return run_ingest(config, store, on_progress=log_progress("image pairs"))
