"""Registering a model as a version: a sealed training, or a folder that was made elsewhere."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.artifact import FACTS_FILE, name_artifact, write_artifact
from prompt_diffusion.registry.artifact_store import find_damage, read_artifact, upload, upload_file
from prompt_diffusion.registry.cache import CARD_FILE, MODELS, digest_listing, is_read, link_or_copy
from prompt_diffusion.registry.card import render_card, render_description
from prompt_diffusion.registry.facts import UNKNOWN, ModelFacts
from prompt_diffusion.registry.provenance import REGISTERED_BASE, collect_facts
from prompt_diffusion.registry.versions import (
    CHALLENGER,
    DIGEST_TAG,
    LICENCES_TAG,
    METRIC_TAG,
    SCHEME,
    SOURCE_TAG,
    TITLE_TAG,
    VISION_TASKS_TAG,
    RegisteredModel,
    find_location,
    first_line,
)
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.local_files import hold
from prompt_diffusion.store.manifest import Manifest, ManifestRef, open_manifest
from prompt_diffusion.store.uris import local_path
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, connect, find_or_create_run, hide_password, knock
from prompt_diffusion.tracking.delivery import deliver_outboxes
from prompt_diffusion.tracking.finishing import finish_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

_DESCRIPTION = "Prompt Diffusion: in-context vision tasks by example pairs."
_ROOM_PREFIX = "registering-"
_MAX_TAG = 5000  # the limit of MLflow's databases, in characters


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
    with _open_registry(settings) as client:

        def stage(root: Path) -> ModelFacts:
            _stage_training(manifest, root)
            return _add_base(client, collect_facts(manifest))

        digests = _list_training(manifest)
        version = _obtain_version(client, settings, digests, model.fingerprint, f"train-{model.fingerprint[:8]}", stage)
        return _name(client, settings, version, alias, metrics or {})


def register_folder(
    folder: Path, settings: Settings, *, name: str | None = None, alias: str | None = CHALLENGER, facts: ModelFacts
) -> RegisteredModel:
    """Make a diffusers folder that was not trained here a model version and give it the alias.

    ``name`` is the registered model, None the settings'. A folder with the same files is one version, whatever its facts; a
    damaged artifact is repaired. ValueError for a folder that holds no Prompt Diffusion pipeline; ConnectionError, within
    seconds, if the registry does not answer.
    """
    paths = _list_files(folder)
    if name is not None:
        settings = settings.model_copy(update={"registered_model": name})
    knock(settings)

    def stage(root: Path) -> ModelFacts:
        for path in paths:
            link_or_copy(folder / path, root / PIPELINE_FOLDER / path)
        return facts

    with _open_registry(settings) as client:
        digests = {path: digest_file(folder / path) for path in paths}
        fingerprint = digest_listing(digests)[1][:32]
        version = _obtain_version(client, settings, digests, fingerprint, f"import-{fingerprint[:8]}", stage)
        return _name(client, settings, version, alias, {})


def record_evaluation(model: ManifestRef, settings: Settings, metrics: Mapping[str, float]) -> list[RegisteredModel]:
    """Add measurements of a sealed training to all its versions, whatever their names; makes no version, moves no alias.

    Empty if the training was never registered, or its versions were deleted: the numbers stay in the table. Errors as in
    `register_model`.
    """
    knock(settings)
    with _open_registry(settings) as client:
        versions = _search(client, f"tags.{FINGERPRINT_TAG} = '{model.fingerprint}'")
        for version in versions:
            _record(client, settings, version, metrics)
    return [
        RegisteredModel(name=version.name, version=str(version.version), alias=None, run_id=version.run_id)
        for version in versions
    ]


def record_metrics(model: RegisteredModel, settings: Settings, metrics: Mapping[str, float]) -> None:
    """Add numbers, such as benchmark cells, to a model version: to its run, to its tags and to its card."""
    with _open_registry(settings) as client:
        _record(client, settings, client.get_model_version(model.name, model.version), metrics)


def describe_registration(model: RegisteredModel) -> str:
    """Return one sentence: which version a model is, and which alias moved to it from where."""
    if model.alias is None:
        return f"the model is {model.uri}; no alias was moved to it"
    before = f"before it was version {model.previous}" if model.previous else "there was none before"
    is_new = model.previous != model.version
    return f"the model is {model.uri}, " + (
        f"now {SCHEME}{model.name}@{model.alias} ({before})" if is_new else f"still {SCHEME}{model.name}@{model.alias}"
    )


@contextmanager
def _open_registry(settings: Settings) -> Iterator["MlflowClient"]:
    """Give a client; of this machine's processes and threads, one registers at a time: the same model makes one version.

    What MLflow raises becomes one sentence: a ConnectionError, if a retry may help, otherwise a ValueError.
    """
    with hold(settings.cache_dir / MODELS / "register.lock"):
        client = connect(settings)
        from mlflow.exceptions import MlflowException

        try:
            yield client
        except MlflowException as error:
            said = f"the registry at {hide_password(settings.tracking_uri)} refused: {hide_password(first_line(error.message))}"
            is_passing = error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
            raise (ConnectionError if is_passing else ValueError)(said) from error


@contextmanager
def _make_room(settings: Settings) -> Iterator[Path]:
    """Yield a folder beside the cache: a model may be too large for the machine's temporary folder."""
    place = settings.cache_dir / MODELS
    for left in place.glob(f"{_ROOM_PREFIX}*"):  # left by a process that was killed: only one registers at a time
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=place, prefix=_ROOM_PREFIX) as folder:
        yield Path(folder) / "model"


def _list_training(manifest: Manifest) -> dict[str, str]:
    """Return the digests, by path, of the files in a training's pipeline that the loader reads."""
    prefix = f"{PIPELINE_FOLDER}/"
    found = {file.path.removeprefix(prefix): file.sha256 for file in manifest.files if file.path.startswith(prefix)}
    return {path: sha256 for path, sha256 in found.items() if is_read(path)}


def _stage_training(manifest: Manifest, root: Path) -> None:
    """Put a training's pipeline below ``root``, checked.

    From a store on this machine the files are hard-linked, not copied; from another they are fetched.
    """
    store = local_path(manifest.ref.uri)
    if store is None:
        folder = manifest.fetch_folder(PIPELINE_FOLDER, root.with_name("fetched"))
        root.mkdir(parents=True)
        folder.rename(root / PIPELINE_FOLDER)
        return
    for name, sha256 in _list_training(manifest).items():
        path = f"{PIPELINE_FOLDER}/{name}"
        link_or_copy(store / path, root / path)
        if digest_file(root / path) != sha256:
            manifest.read_file(path)  # raises an error that says what is wrong, and the remedy


def _list_files(folder: Path) -> list[str]:
    """Return the paths of the files to load: neither pickles nor other precisions; ValueError if this is not a pipeline."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one that holds a pipeline in diffusers' layout")
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = sorted(filter(is_read, found))
    for part in ("controlnet", "unet", "vae", "text_encoder"):
        if not any(path.startswith(f"{part}/") and path.endswith(".safetensors") for path in paths):
            raise ValueError(f"{folder} holds no Prompt Diffusion pipeline: it has no {part} with safetensors weights")
    return paths


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


def _search(client: "MlflowClient", condition: str) -> "list[ModelVersion]":
    return [version for version in client.search_model_versions(condition) if version.status == "READY"]


def _obtain_version(
    client: "MlflowClient",
    settings: Settings,
    digests: dict[str, str],
    fingerprint: str,
    run_name: str,
    stage: Callable[[Path], ModelFacts],
) -> "ModelVersion":
    """Return the version with the fingerprint and exactly these files, its artifact complete; make one if there is none.

    ``stage`` puts the pipeline below a folder, and returns what is known about it.
    """
    listing, digest = digest_listing(digests)
    name = settings.registered_model
    for version in _search(client, f"name = '{name}' and tags.{FINGERPRINT_TAG} = '{fingerprint}'"):
        if version.tags.get(DIGEST_TAG) != digest:
            continue  # retrained on another machine, for example: other weights are another version
        location = find_location(client, version)
        damaged = find_damage(location, digests, digest, settings) if TITLE_TAG in version.tags else []
        if damaged:
            logger.warning("%s%s/%s was altered (%s): uploading it again", SCHEME, name, version.version, damaged[0])
            with _make_room(settings) as root:
                write_artifact(root, stage(root), listing, digest, version.run_id)
                upload(location, root, settings)
            _record(client, settings, version, {})
        return version
    with _make_room(settings) as root:
        facts = stage(root)
        run_id, _ = find_or_create_run(client, settings, run_name, fingerprint)
        write_artifact(root, facts, listing, digest, run_id)
        # The artifact's own address: MLflow would look up models:/m-... at its process-wide address, not at this client's.
        location = _choose_location(client, run_id, name)
        upload(location, root, settings)
    client.set_terminated(run_id)
    return _create_version(client, name, facts, fingerprint, digest, run_id, location)


def _choose_location(client: "MlflowClient", run_id: str, name: str) -> str:
    """Return the model's path among a run's artifacts: one that no other version, or copy of one, uses."""
    taken = {find_location(client, version) for version in client.search_model_versions(f"run_id = '{run_id}'")}
    place = f"{client.get_run(run_id).info.artifact_uri}/{name_artifact(name)}"
    candidates = chain([place], (f"{place}-{number}" for number in count(2)))
    return next(each for each in candidates if each not in taken)


def _create_version(
    client: "MlflowClient", name: str, facts: ModelFacts, fingerprint: str, digest: str, run_id: str, location: str
) -> "ModelVersion":
    """Make the files uploaded to a location a version."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {FINGERPRINT_TAG: fingerprint, DIGEST_TAG: digest}
    tags |= {f"input.{role}": value for role, value in facts.datasets.items()}
    tags |= {
        TITLE_TAG: facts.title[:_MAX_TAG],
        SOURCE_TAG: facts.source[:_MAX_TAG],
        LICENCES_TAG: json.dumps(facts.licences),
    }
    tags |= {VISION_TASKS_TAG: ", ".join(facts.vision_tasks)}
    version: ModelVersion = client.create_model_version(name, location, run_id, tags=tags)
    return version


def _name(
    client: "MlflowClient",
    settings: Settings,
    version: "ModelVersion",
    alias: str | None,
    metrics: Mapping[str, float],
) -> RegisteredModel:
    """Give a version its alias, and its card if it has metrics or no card yet."""
    if metrics or not version.description:
        _record(client, settings, version, metrics)
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


def _record(client: "MlflowClient", settings: Settings, version: "ModelVersion", metrics: Mapping[str, float]) -> None:
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
