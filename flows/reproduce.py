"""The whole method, from the dataset to the table."""

from prefect import flow

from flows.annotate import annotate_six_task
from flows.benchmark import benchmark
from flows.evaluate import evaluate
from flows.ingest import ingest_pairs
from flows.run import Overrides, Preset, Stopwatch, start_run
from flows.train import train_controlnet_baselines, train_six_task
from prompt_diffusion.store.manifest import ManifestRef


@flow(name="reproduce")
def reproduce(preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None) -> ManifestRef:
    """Ingest, annotate, train, evaluate and tabulate; what is sealed already is not made again.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example `{"train.num_steps": 1000}`.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else `outputs/store`.
    """
    run = start_run(preset, overrides, store)
    clock = Stopwatch()
    with clock.time("ingest"):
        ingest_pairs(preset, overrides, run.store)
    with clock.time("annotate"):
        annotate_six_task(preset, overrides, run.store, upstream="require")
    with clock.time("train"):
        train_six_task(preset, overrides, run.store, upstream="require")
    with clock.time("baselines"):
        train_controlnet_baselines(preset, overrides, run.store, upstream="require")
    with clock.time("evaluate"):
        evaluate(preset, overrides, run.store, upstream="require")
    return benchmark(preset, overrides, run.store, upstream="require", seconds=clock.seconds)
