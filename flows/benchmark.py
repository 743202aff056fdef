"""The benchmark: the paper's table, and a report to look at."""

from prefect import flow

from flows.run import Overrides, Preset, Run, Upstream, start_run
from flows.stages import obtain_benchmark, obtain_measurements, obtain_models
from prompt_diffusion.store.manifest import ManifestRef
from tasks.publish import publish_table


@flow(name="benchmark", flow_run_name="benchmark {preset}")
def benchmark(
    preset: Preset = "demo",
    overrides: Overrides | None = None,
    store: str | None = None,
    upstream: Upstream = "make",
) -> ManifestRef:
    """Put what was measured into the paper's table, beside its numbers, and write the report.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"evaluate.num_samples": 50}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    return tabulate(start_run(preset, overrides, store, upstream), {})


def tabulate(run: Run, seconds: dict[str, float]) -> ManifestRef:
    """Make the table of a run, and show it in Prefect's page; ``seconds`` say how long the earlier parts took."""
    table = obtain_benchmark(run.making(), obtain_measurements(run, obtain_models(run)), seconds)
    publish_table(table)
    return table
