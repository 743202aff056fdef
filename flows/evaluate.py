"""Evaluation: every number of the table, measured on the test split."""

from prefect import flow, get_run_logger

from flows.run import Overrides, Preset, Run, Upstream, start_run
from flows.stages import find_models, obtain_measurements, obtain_models
from prompt_diffusion.store.manifest import ManifestRef
from tasks.register import register


@flow(name="evaluate", flow_run_name="evaluate {preset}")
def evaluate(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> list[ManifestRef]:
    """Generate and measure: a cell for each method and vision task, the in-context test, the trivial baselines.

    The numbers of Prompt Diffusion are also recorded with its version in the registry, if it has one. With
    ``upstream="require"``, baselines that are not trained are named and left out; the joint model must exist.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"evaluate.num_samples": 50}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    return measure(start_run(preset, overrides, store, upstream))


def measure(run: Run) -> list[ManifestRef]:
    """Measure the models of a run, and record the joint model's numbers with its version."""
    models = find_models(run) if run.upstream == "require" else obtain_models(run)
    missing = models.list_missing(run)
    if missing:
        get_run_logger().warning(
            "not trained, so not measured: %s (train/controlnet-baselines makes them)", ", ".join(missing)
        )
    measured = obtain_measurements(run.making(), models)
    register(models.six_task, measured.cells)
    return list(measured.cells)
