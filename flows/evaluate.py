"""Evaluation: every number of the table, measured on the test split."""

from prefect import flow

from flows.run import Overrides, Preset, Run, Upstream, start_run
from flows.stages import obtain_measurements, obtain_models
from prompt_diffusion.store.manifest import ManifestRef
from tasks.register import register


@flow(name="evaluate")
def evaluate(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> list[ManifestRef]:
    """Generate and measure: a cell for each method and vision task, the in-context test, the trivial baselines.

    The numbers of Prompt Diffusion also go beside its version in the registry.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example `{"evaluate.num_samples": 50}`.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else `outputs/store`.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    return measure(start_run(preset, overrides, store, upstream))


def measure(run: Run) -> list[ManifestRef]:
    """Measure the models of a run, and put the joint model's numbers beside its version."""
    models = obtain_models(run)
    measured = obtain_measurements(run.making(), models)
    register(models.six_task, measured.cells)
    return list(measured.cells)
