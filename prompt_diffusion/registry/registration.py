"""Registering a model as a version: a sealed training, or a folder that was made elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.cache import digest_listing, link_or_copy
from prompt_diffusion.registry.connection import open_registry
from prompt_diffusion.registry.facts import UNKNOWN, ModelFacts
from prompt_diffusion.registry.measurements import record
from prompt_diffusion.registry.obtain import obtain_version
from prompt_diffusion.registry.provenance import REGISTERED_BASE, collect_facts
from prompt_diffusion.registry.staging import list_folder, list_training, stage_training
from prompt_diffusion.registry.versions import CHALLENGER, DIGEST_TAG, LICENCES_TAG, SCHEME, RegisteredModel
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.tracking.client import knock
from prompt_diffusion.tracking.delivery import deliver_outboxes
from prompt_diffusion.tracking.finishing import finish_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def register_model(
    model: ManifestRef, settings: Settings, metrics: Mapping[str, float] | None = None, alias: str | None = CHALLENGER
) -> RegisteredModel:
    """Make a sealed training a model version and give it the alias; the same model is registered once.

    If the alias is None, no alias moves. If the version exists, its artifact is checked, and what is missing or altered
    is uploaded again. The version carries the training's configuration and fingerprint, the fingerprints of its
    inputs, licences, a model card, and digests of every file. What trainings could not send to MLflow, because it was
    unavailable or they were killed, is delivered first. ConnectionError, within seconds, if the registry does not answer;
    a one-sentence ValueError for what it refuses.
    """
    knock(settings)
    deliver_outboxes(settings)
    finish_run(settings, model)
    manifest = open_manifest(model.uri)
    with open_registry(settings) as client:

        def stage(root: Path) -> ModelFacts:
            stage_training(manifest, root)
            return _add_base(client, collect_facts(manifest))

        digests = list_training(manifest)
        version = obtain_version(client, settings, digests, model.fingerprint, f"train-{model.fingerprint[:8]}", stage)
        return _name(client, settings, version, alias, metrics or {})


def register_folder(
    folder: Path, settings: Settings, *, name: str | None = None, alias: str | None = CHALLENGER, facts: ModelFacts
) -> RegisteredModel:
    """Make a diffusers folder that was not trained here a model version and give it the alias.

    ``name`` is the registered model, None the settings'. A folder with the same files is one version, whatever its facts; a
    damaged artifact is repaired. ValueError for a folder that holds no Prompt Diffusion pipeline; ConnectionError, within
    seconds, if the registry does not answer.
    """
    paths = list_folder(folder)
    if name is not None:
        settings = settings.model_copy(update={"registered_model": name})
    knock(settings)

    def stage(root: Path) -> ModelFacts:
        for path in paths:
            link_or_copy(folder / path, root / PIPELINE_FOLDER / path)
        return facts

    with open_registry(settings) as client:
        digests = {path: digest_file(folder / path) for path in paths}
        fingerprint = digest_listing(digests)[1][:32]
        version = obtain_version(client, settings, digests, fingerprint, f"import-{fingerprint[:8]}", stage)
        return _name(client, settings, version, alias, {})


def describe_registration(model: RegisteredModel) -> str:
    """Return one sentence: which version a model is, and which alias moved to it from where."""
    if model.alias is None:
        return f"the model is {model.uri}; no alias was moved to it"
    before = f"before it was version {model.previous}" if model.previous else "there was none before"
    is_new = model.previous != model.version
    return f"the model is {model.uri}, " + (
        f"now {SCHEME}{model.name}@{model.alias} ({before})" if is_new else f"still {SCHEME}{model.name}@{model.alias}"
    )


def _add_base(client: "MlflowClient", facts: ModelFacts) -> ModelFacts:
    """Record which version a training started from, if that was a registered model, and inherit its licences."""
    digest = facts.base.removeprefix(REGISTERED_BASE)
    if digest == facts.base:
        return facts
    for version in client.search_model_versions(f"tags.{DIGEST_TAG} = '{digest}'"):
        licences: dict[str, str] = json.loads(version.tags.get(LICENCES_TAG, "{}"))
        own = {part: licence for part, licence in facts.licences.items() if part != "base"}
        theirs = {part if part == "base" else f"base's {part}": licence for part, licence in licences.items()}
        name = f"{SCHEME}{version.name}/{version.version}"
        return facts.model_copy(update={"base": name, "licences": {"base": UNKNOWN} | theirs | own})
    return facts


def _name(
    client: "MlflowClient",
    settings: Settings,
    version: "ModelVersion",
    alias: str | None,
    metrics: Mapping[str, float],
) -> RegisteredModel:
    """Give a version its alias, and its card if it has metrics or no card yet."""
    if metrics or not version.description:
        record(client, settings, version, metrics)
    previous = None
    if alias is not None:
        previous = client.get_registered_model(version.name).aliases.get(alias)
        client.set_registered_model_alias(version.name, alias, version.version)
    return RegisteredModel(
        name=version.name,
        version=str(version.version),
        alias=alias,
        run_id=version.run_id,
        previous=None if previous is None else str(previous),
    )
