"""The whole method, from the dataset to the table."""

from prefect import flow

from flows.annotate import annotate
from flows.benchmark import tabulate
from flows.evaluate import measure
from flows.run import Overrides, Preset, Run, Stopwatch, as_subflow, start_run
from flows.stages import obtain_pairs
from flows.train import train_baselines, train_joint_model
from prompt_diffusion.store.manifest import ManifestRef

PARTS = ("ingest", "annotate", "train", "baselines", "evaluate", "table")


@flow(name="reproduce", flow_run_name="reproduce {preset}")
def reproduce(preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None) -> ManifestRef:
    """Ingest, annotate, train, evaluate and tabulate; sealed stages are not made again.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"train.num_steps": 1000}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
    """
    return reproduce_run(start_run(preset, overrides, store))


def reproduce_run(run: Run) -> ManifestRef:
    """Make everything in a run, part by part; its names were resolved once, and mean the same to every part."""
    made, clock = run.requiring(), Stopwatch(PARTS)
    with clock.time("ingest"):
        as_subflow(obtain_pairs, "ingest")(run)
    with clock.time("annotate"):
        as_subflow(annotate, "annotate")(made)
    with clock.time("train"):
        as_subflow(train_joint_model, "train")(made)
    with clock.time("baselines"):
        as_subflow(train_baselines, "train", "baselines")(made)
    with clock.time("evaluate"):
        as_subflow(measure, "evaluate")(made)
    with clock.time("table"):
        return as_subflow(tabulate, "benchmark")(made, clock.seconds)
