"""Training: one model of six vision tasks, the six baselines that know one each, and a user's own vision task."""

from dataclasses import replace

from prefect import flow
from pydantic import ValidationError

from flows.run import Overrides, Preset, Run, Upstream, start_run
from flows.stages import obtain_baselines, obtain_dataset, obtain_inputs, obtain_joint_model, obtain_pairs
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.sources.image_folder import ImageFolderConfig
from prompt_diffusion.frozen import say_first_error
from prompt_diffusion.model.references import BESIDE_BASE
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.training.inputs import TrainInputs, check_pairs
from prompt_diffusion.vision_tasks import VISION_TASKS
from tasks.register import choose_alias, register


@flow(name="train", flow_run_name="train {preset}")
def train_six_task(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> ManifestRef:
    """Train one Prompt Diffusion model on all six vision tasks, and register it: as the challenger, except in a smoke run.

    A run that was stopped resumes from its last checkpoint when the same run is started again.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"train.num_steps": 1000}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    return train_joint_model(start_run(preset, overrides, store, upstream))


def train_joint_model(run: Run) -> ManifestRef:
    """Train the joint model of a run, and register it."""
    model = obtain_joint_model(run.making(), prepare_inputs(run))
    register(model, alias=choose_alias(run.config.name))
    return model


@flow(name="train", flow_run_name="train baselines {preset}")
def train_controlnet_baselines(
    preset: Preset = "demo", overrides: Overrides | None = None, store: str | None = None, upstream: Upstream = "make"
) -> dict[str, ManifestRef]:
    """Train the CN(FT) baselines: one ControlNet per vision task, on the query alone, on as many samples of its task.

    Args:
        preset: The complete configuration to start from.
        overrides: Single fields to change, by dotted name, for example ``{"baselines.batch_size": 64}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    return train_baselines(start_run(preset, overrides, store, upstream))


def train_baselines(run: Run) -> dict[str, ManifestRef]:
    """Train the baselines of a run."""
    return obtain_baselines(run.making(), prepare_inputs(run))


@flow(name="train", flow_run_name="train {condition} from {folder}")
def train_custom(
    folder: str,
    condition: str,
    mixed: bool = False,
    reading: Overrides | None = None,
    model: str | None = "models:/prompt-diffusion@challenger",
    steps: int | None = None,
    preset: Preset = "demo",
    overrides: Overrides | None = None,
    store: str | None = None,
    upstream: Upstream = "make",
) -> ManifestRef:
    """Train your own vision task, from a folder of (source, target) pairs, and register the model under its own name.

    The vision task is called ``{condition}_to_image``; the registered model ``prompt-diffusion-{condition}``.

    Args:
        folder: The pairs: images with ``metadata.csv`` of ``source_file_name``, ``target_file_name`` and ``caption``, at a
            path or URI.
        condition: What the source images are, in one word of your choice, for example ``sketch``.
        mixed: Train on the preset's six vision tasks too, so that they are not forgotten; all are drawn equally often.
        reading: How the table is read where its columns have other names, for example ``{"caption_column": "text"}``.
        model: The registered model or folder to start from; none: the preset's base with a new ControlNet.
        steps: Optimizer steps; empty means the preset's.
        preset: The complete configuration to start from: resolution, recipe and, where mixed, the six tasks' dataset.
        overrides: Single fields to change, by dotted name, for example ``{"train.batch_size": 16}``.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about earlier stages that are not sealed yet: make them, or fail and name the first.
    """
    changes = build_custom_overrides(condition, mixed, model, steps) | (overrides or {})
    run = start_run(preset, changes, store, upstream)
    trained = obtain_joint_model(run.making(), prepare_custom_inputs(run, folder, condition, mixed, reading))
    register(trained, name=f"{run.settings.registered_model}-{condition}", alias=choose_alias(preset))
    return trained


def build_custom_overrides(condition: str, mixed: bool, model: str | None, steps: int | None) -> Overrides:
    """Return what a training on a user's own pairs changes in a preset; ValueError if the condition's name is taken."""
    names = {task.condition for task in VISION_TASKS.values()}
    if mixed and condition in names:
        raise ValueError(
            f"the condition {condition!r} is one of the six vision tasks' own: mixed with them, give it another name"
        )
    own = f"{condition}_to_image"
    changes: Overrides = {
        "train.vision_tasks": [*VISION_TASKS, own] if mixed else [own],
        # A user's pair has no edited twin: an example from its own group would show the answer.
        "train.map_to_image_examples": {"other_group": 1.0},
    }
    if model is not None:
        changes |= {"train.base": model, "train.controlnet": BESIDE_BASE}
    if steps is not None:
        changes["train.num_steps"] = steps
    return changes


def prepare_custom_inputs(
    run: Run, folder: str, condition: str, mixed: bool, reading: Overrides | None = None
) -> TrainInputs:
    """Return what a training on a user's own pairs reads; the pairs come first, so that their faults are reported at once."""
    pairs = use_pairs(run, folder, condition, reading)
    check_pairs(obtain_pairs(pairs))
    own = prepare_inputs(pairs)
    return prepare_inputs(run).model_copy(update={"others": (own,)}) if mixed else own


def use_pairs(run: Run, folder: str, condition: str, reading: Overrides | None = None) -> Run:
    """Return the run with a user's pairs instead of the preset's dataset, ingested in the same way.

    If the run's own source is an image folder, its columns and grey values apply to the pairs, but for what ``reading`` says.
    ValueError for a field that an image folder does not have.
    """
    given = run.config.ingest.source
    fields = given.model_dump() if isinstance(given, ImageFolderConfig) else {}
    try:
        source = ImageFolderConfig.model_validate(fields | (reading or {}) | {"uri": folder, "condition": condition})
    except ValidationError as error:
        raise ValueError(f"reading: {say_first_error(error)}") from None
    ingest = run.config.ingest.model_copy(update={"source": source})
    pairs = {"ingest": ingest, "annotate": (AnnotateConfig(condition=condition),)}
    return replace(run, config=run.config.model_copy(update=pairs))


def prepare_inputs(run: Run) -> TrainInputs:
    """Return what both trainings read: the pairs and maps of earlier flows, and their latents, made here."""
    pairs = obtain_pairs(run)
    return obtain_inputs(run.making(), obtain_dataset(run, pairs))
