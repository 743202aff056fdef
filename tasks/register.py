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
    """Make a trained model a version of the registered model, and give it the alias; the same model is one version.

    With `cells`, what was measured, nothing is made and no alias moves: the numbers go to the versions that are there, if any.
    `name` stands for another registered model than the settings'; without an `alias` none moves, as after a smoke run.
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
    """Return the alias that a training's version gets: none after a smoke run, whose model is of no use to anybody."""
    return None if preset == "smoke" else CHALLENGER
