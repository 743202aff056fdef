"""The measurements of registered versions: on their runs, their tags and their cards."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.artifact import FACTS_FILE
from prompt_diffusion.registry.artifact_store import read_artifact, upload_file
from prompt_diffusion.registry.cache import CARD_FILE
from prompt_diffusion.registry.card import render_card, render_description
from prompt_diffusion.registry.connection import open_registry, search_ready
from prompt_diffusion.registry.facts import ModelFacts
from prompt_diffusion.registry.versions import METRIC_TAG, SCHEME, TITLE_TAG, RegisteredModel, find_location
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.records import ManifestRef
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, knock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)


def record_evaluation(model: ManifestRef, settings: Settings, metrics: Mapping[str, float]) -> list[RegisteredModel]:
    """Add measurements of a sealed training to all its versions, whatever their names; makes no version, moves no alias.

    Empty if the training was never registered, or its versions were deleted: the numbers stay in the table. Errors as in
    ``register_model``.
    """
    knock(settings)
    with open_registry(settings) as client:
        versions = search_ready(client, f"tags.{FINGERPRINT_TAG} = '{model.fingerprint}'")
        for version in versions:
            record(client, settings, version, metrics)
    return [
        RegisteredModel(name=version.name, version=str(version.version), alias=None, run_id=version.run_id)
        for version in versions
    ]


def record_metrics(model: RegisteredModel, settings: Settings, metrics: Mapping[str, float]) -> None:
    """Add numbers, such as benchmark cells, to a model version: to its run, to its tags and to its card."""
    with open_registry(settings) as client:
        record(client, settings, client.get_model_version(model.name, model.version), metrics)


def record(client: "MlflowClient", settings: Settings, version: "ModelVersion", metrics: Mapping[str, float]) -> None:
    """Store metrics, and render the card from everything known now."""
    uri = f"{SCHEME}{version.name}/{version.version}"
    if metrics and not _log_metrics(client, version.run_id, metrics):
        logger.info("the run of %s was deleted: its numbers stand beside the version alone", uri)
    for name, value in metrics.items():
        client.set_model_version_tag(version.name, version.version, f"{METRIC_TAG}{name}", f"{value:.6g}")
    tags = client.get_model_version(version.name, version.version).tags
    if TITLE_TAG not in tags:
        return  # registered before there were cards
    known = {key.removeprefix(METRIC_TAG): float(value) for key, value in tags.items() if key.startswith(METRIC_TAG)}
    location = find_location(client, version)
    content = read_artifact(location, FACTS_FILE, settings)
    if content is None:
        logger.warning("%s has lost its %s: its card stays as it is; register the model again", uri, FACTS_FILE)
        return
    facts = ModelFacts.model_validate_json(content)
    client.update_model_version(version.name, version.version, render_description(facts, uri, known))
    if not version.source.startswith(SCHEME):  # a copy has no files of its own
        upload_file(location, f"{PIPELINE_FOLDER}/{CARD_FILE}", render_card(facts, uri, known).encode(), settings)


def _log_metrics(client: "MlflowClient", run_id: str, metrics: Mapping[str, float]) -> bool:
    """Add metrics to a run; False if it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
    except MlflowException as error:
        if error.error_code not in (
            "RESOURCE_DOES_NOT_EXIST",
            "INVALID_PARAMETER_VALUE",
        ):  # for a deleted run, for an empty id
            raise
        return False
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)
    return True
