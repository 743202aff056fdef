"""Training: one model of six vision tasks, and the six baselines that know one vision task each."""

from prefect import flow

from flows.run import Overrides, Preset, Run, Upstream, start_run
from flows.stages import obtain_baselines, obtain_inputs, obtain_maps, obtain_pairs, obtain_six_task_model
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.training.stage import TrainInputs
from tasks.register import register


@flow(name="train")
def train_six_task(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> ManifestRef:
    """Train one Prompt Diffusion model on all six vision tasks, and register it as the challenger.

    A run that was stopped goes on from its last checkpoint when the same run is started again.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example `{"train.num_steps": 1000}`.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else `outputs/store`.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    run = start_run(preset, overrides, store, upstream)
    model = obtain_six_task_model(run.making(), prepare_inputs(run))
    register(model)
    return model


@flow(name="train")
def train_controlnet_baselines(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> dict[str, ManifestRef]:
    """Train the CN(FT) baselines: one ControlNet a vision task, on the query alone, on as many samples of its vision task.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example `{"baselines.batch_size": 64}`.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else `outputs/store`.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    run = start_run(preset, overrides, store, upstream)
    return obtain_baselines(run.making(), prepare_inputs(run))


def prepare_inputs(run: Run) -> TrainInputs:
    """Return what both trainings read: the pairs and maps of earlier flows, and their latents, made here."""
    pairs = obtain_pairs(run)
    return obtain_inputs(run.making(), pairs, obtain_maps(run, pairs))
