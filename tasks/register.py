"""The registry, as tasks."""

from prefect import get_run_logger, task

from prompt_diffusion.evaluation.cells import read_cell
from prompt_diffusion.registry import (
    CHALLENGER,
    RegisteredModel,
    describe_registration,
    record_evaluation,
    register_model,
)
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
def register(
    model: ManifestRef,
    cells: tuple[ManifestRef, ...] = (),
    name: str | None = None,
    alias: str | None = CHALLENGER,
) -> RegisteredModel | None:
    """Make a trained model a version of the registered model, with the alias; registering it again makes no new version.

    With ``cells`` (measurements) no version is made and no alias moves: the numbers go to existing versions, if any.
    ``name`` replaces the settings' registered model; without an ``alias`` none moves, as after a smoke run.
    """
    logger = get_run_logger()
    results = [result for result in map(read_cell, cells) if result.method == "Prompt Diffusion"]
    metrics = {f"{result.metric}/{result.vision_task}": result.value for result in results}
    settings = load_settings()
    if name is not None:
        settings = settings.model_copy(update={"registered_model": name})
    if cells:
        versions = record_evaluation(model, settings, metrics)
        found = ", ".join(version.uri for version in versions)
        logger.info("measured: %s", found or f"training {model.fingerprint}, which no registered model has")
        return versions[0] if versions else None
    registered = register_model(model, settings, alias=alias)
    logger.info(describe_registration(registered))
    return registered


def choose_alias(preset: str) -> str | None:
    """Return the alias that a training's version gets: none after a smoke run, whose model is useless."""
    return None if preset == "smoke" else CHALLENGER
