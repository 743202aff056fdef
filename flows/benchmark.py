"""The benchmark: the paper's table, and a report to look at."""

from prefect import flow

from flows.run import Overrides, Preset, Upstream, start_run
from flows.stages import obtain_benchmark, obtain_measurements, obtain_models
from prompt_diffusion.store.manifest import ManifestRef
from tasks.benchmark import publish


@flow(name="benchmark")
def benchmark(
    preset: Preset = "demo",
    overrides: Overrides | None = None,
    store: str | None = None,
    upstream: Upstream = "make",
    seconds: dict[str, float] | None = None,
) -> ManifestRef:
    """Put what was measured into the paper's table, beside its numbers, and write the report.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example `{"evaluate.num_samples": 50}`.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else `outputs/store`.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
        seconds: How long each stage took, for the table; a parent flow knows it.
    """
    run = start_run(preset, overrides, store, upstream)
    table = obtain_benchmark(run.making(), obtain_measurements(run, obtain_models(run)), seconds or {})
    publish(table)
    return table
