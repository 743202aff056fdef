"""The registry, as tasks."""

from prefect import task

from prompt_diffusion.evaluation.cells import read_cell
from prompt_diffusion.registry import CHALLENGER, RegisteredModel, register_model
from prompt_diffusion.settings import load_settings
from prompt_diffusion.store.manifest import ManifestRef
from tasks.retries import is_transient

HOUR_SECONDS = 3600


@task(
    name="register",
    task_run_name="register {model.fingerprint:.8}",
    persist_result=False,
    retries=3,
    retry_delay_seconds=30,
    retry_condition_fn=is_transient,
    timeout_seconds=HOUR_SECONDS,
)
def register(model: ManifestRef, cells: tuple[ManifestRef, ...] = (), name: str | None = None) -> RegisteredModel:
    """Make a trained model a version of the registered model, with what was measured of it; the same model is one version.

    A training makes it the challenger; measuring it again leaves the aliases as they are.
    `name` stands for another registered model than the settings'.
    """
    results = [result for result in map(read_cell, cells) if result.method == "Prompt Diffusion"]
    metrics = {f"{result.metric}/{result.vision_task}": result.value for result in results}
    settings = load_settings()
    if name is not None:
        settings = settings.model_copy(update={"registered_model": name})
    return register_model(model, settings, metrics, alias=None if cells else CHALLENGER)
