"""Condition maps of image pairs, as a task: one a condition."""

from prefect import task

from prompt_diffusion.annotators.annotate import AnnotateConfig, identify_annotate, run_annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.store.manifest import ManifestRef
from tasks.caching import DAY_SECONDS, build_stage_options
from tasks.progress import log_progress


@task(
    name="annotate",
    task_run_name="annotate {config.condition} with {config.annotator}",
    **build_stage_options(identify_annotate, timeout_seconds=7 * DAY_SECONDS),
)
def annotate(config: AnnotateConfig, pairs: ManifestRef, store: str, resources: AnnotateResources) -> ManifestRef:
    """Make the condition maps of both images of every pair."""
    return run_annotate(config, pairs, store, resources, on_progress=log_progress(f"{config.condition} maps"))
