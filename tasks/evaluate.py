"""The measurements, as tasks: generated images, benchmark cells, the in-context test, the trivial baselines."""

from prefect import task

from prompt_diffusion.evaluation.cells import CellConfig, identify_cell, run_cell
from prompt_diffusion.evaluation.config import EvalResources, EvaluateConfig
from prompt_diffusion.evaluation.generate import GenerateConfig, identify_generate, run_generate
from prompt_diffusion.evaluation.in_context import identify_in_context, run_in_context
from prompt_diffusion.evaluation.trivial import TrivialConfig, identify_trivial, run_trivial
from prompt_diffusion.store.manifest import ManifestRef
from tasks.caching import DAY_SECONDS, build_stage_options
from tasks.progress import log_progress

Maps = dict[str, ManifestRef]


@task(
    name="generate",
    task_run_name="generate {config.vision_task} with {model.fingerprint:.8}",
    **build_stage_options(identify_generate, timeout_seconds=7 * DAY_SECONDS),
)
def generate(
    config: GenerateConfig, model: ManifestRef, pairs: ManifestRef, maps: Maps, store: str, resources: EvalResources
) -> ManifestRef:
    """Let a model answer the test queries of one vision task."""
    progress = log_progress(f"images of {config.vision_task}")
    return run_generate(config, model, pairs, maps, store, resources, on_progress=progress)


@task(
    name="measure",
    task_run_name="measure {config.metric} of {config.method}, {config.vision_task}",
    **build_stage_options(identify_cell, timeout_seconds=DAY_SECONDS),
)
def measure(
    config: CellConfig,
    generations: ManifestRef,
    model: ManifestRef,
    pairs: ManifestRef,
    maps: Maps,
    store: str,
    resources: EvalResources,
) -> ManifestRef:
    """Turn generated images into one benchmark cell."""
    return run_cell(config, generations, model, pairs, maps, store, resources)


@task(
    name="in-context test",
    **build_stage_options(identify_in_context, timeout_seconds=DAY_SECONDS),
)
def measure_in_context(
    config: EvaluateConfig, model: ManifestRef, pairs: ManifestRef, maps: Maps, store: str, resources: EvalResources
) -> ManifestRef:
    """Ask, with no text, which map comes out under each example pair."""
    progress = log_progress("images of the in-context test")
    return run_in_context(config, model, pairs, maps, store, resources, on_progress=progress)


@task(
    name="trivial baselines",
    **build_stage_options(identify_trivial, timeout_seconds=DAY_SECONDS),
)
def measure_trivial(config: TrivialConfig, pairs: ManifestRef, maps: Maps, store: str) -> ManifestRef:
    """Measure what needs no model at all."""
    return run_trivial(config, pairs, maps, store)
