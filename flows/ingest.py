"""Image pairs: the dataset, at the training resolution, split by prompt group."""

from prefect import flow

from flows.run import Overrides, Preset, start_run
from flows.stages import obtain_pairs
from prompt_diffusion.store.manifest import ManifestRef


@flow(name="ingest", flow_run_name="ingest {preset}")
def ingest_pairs(preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None) -> ManifestRef:
    """Read the source of image pairs, reject broken samples with a reason, and seal the rest.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"ingest.image_size": 128}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
    """
    return obtain_pairs(start_run(preset, overrides, store, needs_models=False))
