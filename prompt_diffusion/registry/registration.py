"""Making a model a version: a sealed training, or a folder that was made elsewhere."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.model.digest import digest_file
from prompt_diffusion.model.references import FILES
from prompt_diffusion.registry.download import DIGEST_TAG, DIGESTS_FILE
from prompt_diffusion.registry.facts import ModelFacts
from prompt_diffusion.registry.versions import (
    CHALLENGER,
    LICENCES_TAG,
    METRIC_TAG,
    SOURCE_TAG,
    TITLE_TAG,
    VISION_TASKS_TAG,
    RegisteredModel,
)
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.manifest import Manifest, ManifestRef, open_manifest
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, connect, find_or_create_run
from prompt_diffusion.tracking.delivery import deliver_outboxes
from prompt_diffusion.training.stage import PIPELINE_FOLDER

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_LOCK = threading.Lock()  # two threads with the same model make one version


def register_model(
    model: ManifestRef, settings: Settings, metrics: Mapping[str, float] | None = None, alias: str = CHALLENGER
) -> RegisteredModel:
    """Make a sealed training a model version and give it the alias; the same model is registered once.

    The version carries the training's fingerprint, the fingerprints of its inputs, and digests of every file. What trainings
    could not tell MLflow when it was away is delivered first.
    """
    deliver_outboxes(settings)
    manifest = open_manifest(model.uri)
    with _LOCK:
        client = connect(settings)
        version = _find_version(client, settings.registered_model, model.fingerprint)
        if version is None:
            with tempfile.TemporaryDirectory() as folder:
                pipeline = manifest.fetch_folder(PIPELINE_FOLDER, Path(folder))
                version = _create_version(
                    client,
                    settings,
                    pipeline,
                    _collect_facts(manifest),
                    model.fingerprint,
                    f"train-{model.fingerprint[:8]}",
                )
        client.set_registered_model_alias(version.name, alias, version.version)
    registered = RegisteredModel(name=version.name, version=str(version.version), alias=alias, run_id=version.run_id)
    if metrics:
        record_metrics(registered, settings, metrics)
    return registered


def register_folder(
    folder: Path, settings: Settings, *, name: str | None = None, alias: str = CHALLENGER, facts: ModelFacts
) -> RegisteredModel:
    """Make a diffusers folder that was not trained here a model version and give it the alias.

    ``name`` is the registered model, None the settings'. A folder with the same files is one version, whatever its facts.
    ValueError for a folder that holds no Prompt Diffusion pipeline.
    """
    files = _list_files(folder)
    if "controlnet/config.json" not in files or not any(path.endswith(".safetensors") for path in files):
        raise ValueError(f"{folder} holds no Prompt Diffusion pipeline in diffusers' layout: it has no controlnet")
    if name is not None:
        settings = settings.model_copy(update={"registered_model": name})
    with _LOCK, tempfile.TemporaryDirectory(dir=folder.resolve().parent) as place:
        client = connect(settings)
        pipeline = Path(place) / PIPELINE_FOLDER
        for path in files:
            _link(folder / path, pipeline / path)
        fingerprint = compute_digest(_list_digests(pipeline))[:32]
        version = _find_version(client, settings.registered_model, fingerprint) or _create_version(
            client, settings, pipeline, facts, fingerprint, f"import-{fingerprint[:8]}"
        )
        client.set_registered_model_alias(version.name, alias, version.version)
    return RegisteredModel(name=version.name, version=str(version.version), alias=alias, run_id=version.run_id)


def record_metrics(model: RegisteredModel, settings: Settings, metrics: Mapping[str, float]) -> None:
    """Add numbers, such as benchmark cells, to a model version: to its run, and as tags to be read beside it."""
    client = connect(settings)
    for name, value in metrics.items():
        client.log_metric(model.run_id, name, value)
        client.set_model_version_tag(model.name, model.version, f"{METRIC_TAG}{name}", f"{value:.6g}")


def _collect_facts(manifest: Manifest) -> ModelFacts:
    identity = manifest.identity
    return ModelFacts(
        title="Prompt Diffusion",
        source=f"trained here, training {identity.fingerprint}",
        vision_tasks=tuple(identity.config["vision_tasks"]),
        configuration=identity.config,
        datasets=identity.inputs,
    )


def _list_files(folder: Path) -> list[str]:
    """Return the paths of what is read of a pipeline: neither pickles nor other precisions."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: a pipeline in diffusers' layout is registered")
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if any(fnmatch(path, pattern) for pattern in FILES))


def _list_digests(pipeline: Path) -> bytes:
    paths = sorted(path for path in pipeline.rglob("*") if path.is_file())
    digests = {path.relative_to(pipeline).as_posix(): digest_file(path) for path in paths}
    return json.dumps(digests, indent=2, sort_keys=True).encode()


def _link(source: Path, target: Path) -> None:
    """Let a second name stand for a file, or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _find_version(client: "MlflowClient", name: str, fingerprint: str) -> "ModelVersion | None":
    # a name that is not registered yet has no versions: an empty list
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(FINGERPRINT_TAG) == fingerprint and version.status == "READY":
            found: ModelVersion = version
            return found
    return None


def _create_version(
    client: "MlflowClient", settings: Settings, pipeline: Path, facts: ModelFacts, fingerprint: str, run_name: str
) -> "ModelVersion":
    """Upload a pipeline with its digests, and make it a version."""
    from mlflow.exceptions import MlflowException

    listing = _list_digests(pipeline)
    run_id, _ = find_or_create_run(client, settings, run_name, fingerprint)
    (pipeline / DIGESTS_FILE).write_bytes(listing)
    client.log_artifacts(run_id, str(pipeline), PIPELINE_FOLDER)
    client.set_terminated(run_id)
    name = settings.registered_model
    try:
        client.create_registered_model(name, description="Prompt Diffusion: in-context vision tasks by example pairs.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {FINGERPRINT_TAG: fingerprint, DIGEST_TAG: compute_digest(listing)}
    tags |= {f"input.{role}": digest for role, digest in facts.datasets.items()}
    tags |= {TITLE_TAG: facts.title, SOURCE_TAG: facts.source, LICENCES_TAG: json.dumps(facts.licences)}
    tags |= {VISION_TASKS_TAG: ", ".join(facts.vision_tasks)}
    source = f"{client.get_run(run_id).info.artifact_uri}/{PIPELINE_FOLDER}"
    version: ModelVersion = client.create_model_version(name, source, run_id, tags=tags)
    return version
