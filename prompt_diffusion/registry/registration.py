"""Making a model a version: a sealed training, or a folder that was made elsewhere."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.model.digest import digest_file
from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.artifact import FACTS_FILE, name_artifact, write_artifact
from prompt_diffusion.registry.cache import CARD_FILE, MODELS, digest_listing, hold, is_read, link_or_copy
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
)
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.manifest import Manifest, ManifestRef, open_manifest
from prompt_diffusion.store.storage import local_path
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, connect, find_or_create_run, knock
from prompt_diffusion.tracking.delivery import deliver_outboxes

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_DESCRIPTION = "Prompt Diffusion: in-context vision tasks by example pairs."
_ROOM_PREFIX = "registering-"
_MAX_TAG = 5000  # characters that MLflow's databases hold


def register_model(
    model: ManifestRef, settings: Settings, metrics: Mapping[str, float] | None = None, alias: str | None = CHALLENGER
) -> RegisteredModel:
    """Make a sealed training a model version and give it the alias; the same model is registered once.

    Where the alias is None, a new version becomes the challenger, and one that is there keeps what it has.
    The version carries the training's configuration and fingerprint, the fingerprints of its inputs, licences, a model card,
    and digests of every file. What trainings could not tell MLflow when it was away is delivered first. ConnectionError,
    within seconds, where the registry does not answer.
    """
    knock(settings)
    deliver_outboxes(settings)
    manifest = open_manifest(model.uri)
    with _open_registry(settings) as client:
        version = _find_version(client, settings.registered_model, model.fingerprint)
        if version is None:
            alias = alias or CHALLENGER
            with _make_room(settings) as root:
                digests = _stage_training(manifest, root)
                facts = _add_base(client, collect_facts(manifest))
                version = _create_version(
                    client, settings, root, digests, facts, model.fingerprint, f"train-{model.fingerprint[:8]}"
                )
        return _name(client, version, alias, metrics or {})


def register_folder(
    folder: Path, settings: Settings, *, name: str | None = None, alias: str = CHALLENGER, facts: ModelFacts
) -> RegisteredModel:
    """Make a diffusers folder that was not trained here a model version and give it the alias.

    ``name`` is the registered model, None the settings'. A folder with the same files is one version, whatever its facts.
    ValueError for a folder that holds no Prompt Diffusion pipeline; ConnectionError, within seconds, where the registry does
    not answer.
    """
    paths = _list_files(folder)
    if name is not None:
        settings = settings.model_copy(update={"registered_model": name})
    knock(settings)
    with _open_registry(settings) as client, _make_room(settings) as root:
        digests = {}
        for path in paths:
            link_or_copy(folder / path, root / PIPELINE_FOLDER / path)
            digests[path] = digest_file(root / PIPELINE_FOLDER / path)
        fingerprint = digest_listing(digests)[1][:32]
        version = _find_version(client, settings.registered_model, fingerprint) or _create_version(
            client, settings, root, digests, facts, fingerprint, f"import-{fingerprint[:8]}"
        )
        return _name(client, version, alias, {})


def record_metrics(model: RegisteredModel, settings: Settings, metrics: Mapping[str, float]) -> None:
    """Add numbers, such as benchmark cells, to a model version: to its run, as tags to be read beside it, and to its card."""
    client = connect(settings)
    version = client.get_model_version(model.name, model.version)
    _record(client, version, metrics)


@contextmanager
def _open_registry(settings: Settings) -> Iterator["MlflowClient"]:
    """Give a client; of this machine's processes and threads, one registers at a time: the same model makes one version."""
    with hold(settings.cache_dir / MODELS / "register.lock"):
        yield connect(settings)


@contextmanager
def _make_room(settings: Settings) -> Iterator[Path]:
    """Give a folder beside the cache: a model is larger than what a machine's temporary folder may hold."""
    place = settings.cache_dir / MODELS
    for left in place.glob(f"{_ROOM_PREFIX}*"):  # of a process that was killed: one registers at a time
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=place, prefix=_ROOM_PREFIX) as folder:
        yield Path(folder) / "model"


def _stage_training(manifest: Manifest, root: Path) -> dict[str, str]:
    """Lay a training's pipeline out below ``root``, checked, and return its digests by path.

    From a store on this machine the files get a second name, no copy; from another they are fetched.
    """
    prefix = f"{PIPELINE_FOLDER}/"
    files = [
        file for file in manifest.files if file.path.startswith(prefix) and is_read(file.path.removeprefix(prefix))
    ]
    store = local_path(manifest.ref.uri)
    if store is None:
        folder = manifest.fetch_folder(PIPELINE_FOLDER, root.with_name("fetched"))
        root.mkdir(parents=True)
        folder.rename(root / PIPELINE_FOLDER)
    else:
        for file in files:
            link_or_copy(store / file.path, root / file.path)
            if digest_file(root / file.path) != file.sha256:
                manifest.read_file(file.path)  # says what is wrong with it, and the way out
    return {file.path.removeprefix(prefix): file.sha256 for file in files}


def _list_files(folder: Path) -> list[str]:
    """Return the paths of what is read of a pipeline: neither pickles nor other precisions; ValueError for no pipeline."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one that holds a pipeline in diffusers' layout")
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = sorted(filter(is_read, found))
    for part in ("controlnet", "unet", "vae", "text_encoder"):
        if not any(path.startswith(f"{part}/") and path.endswith(".safetensors") for path in paths):
            raise ValueError(f"{folder} holds no Prompt Diffusion pipeline: it has no {part} with safetensors weights")
    return paths


def _add_base(client: "MlflowClient", facts: ModelFacts) -> ModelFacts:
    """Say which version a training began from, where that was a registered model, and take its licences over."""
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


def _find_version(client: "MlflowClient", name: str, fingerprint: str) -> "ModelVersion | None":
    # a name that is not registered yet has no versions: an empty list
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(FINGERPRINT_TAG) == fingerprint and version.status == "READY":
            found: ModelVersion = version
            return found
    return None


def _create_version(
    client: "MlflowClient",
    settings: Settings,
    root: Path,
    digests: dict[str, str],
    facts: ModelFacts,
    fingerprint: str,
    run_name: str,
) -> "ModelVersion":
    """Upload what lies in ``root`` and make it a version."""
    from mlflow.exceptions import MlflowException

    listing, digest = digest_listing(digests)
    run_id, _ = find_or_create_run(client, settings, run_name, fingerprint)
    name = settings.registered_model
    write_artifact(root, facts, listing, digest, run_id)
    client.log_artifacts(run_id, str(root), name_artifact(name))
    client.set_terminated(run_id)
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
    # The artifact's own address: MLflow would look up models:/m-... at its process-wide address, not at this client's.
    source = f"{client.get_run(run_id).info.artifact_uri}/{name_artifact(name)}"
    version: ModelVersion = client.create_model_version(name, source, run_id, tags=tags)
    return version


def _name(
    client: "MlflowClient", version: "ModelVersion", alias: str | None, metrics: Mapping[str, float]
) -> RegisteredModel:
    """Give a version its alias, and its card once it has metrics or none yet."""
    if metrics or not version.description:
        _record(client, version, metrics)
    if alias is not None:
        client.set_registered_model_alias(version.name, alias, version.version)
    return RegisteredModel(name=version.name, version=str(version.version), alias=alias, run_id=version.run_id)


def _record(client: "MlflowClient", version: "ModelVersion", metrics: Mapping[str, float]) -> None:
    """Keep metrics, and render the card of all that is known now."""
    for name, value in metrics.items():
        client.log_metric(version.run_id, name, value)
        client.set_model_version_tag(version.name, version.version, f"{METRIC_TAG}{name}", f"{value:.6g}")
    tags = client.get_model_version(version.name, version.version).tags
    known = {key.removeprefix(METRIC_TAG): float(value) for key, value in tags.items() if key.startswith(METRIC_TAG)}
    facts = _read_facts(client, version)
    if facts is None:
        return  # registered before there were cards
    uri = f"{SCHEME}{version.name}/{version.version}"
    client.update_model_version(version.name, version.version, render_description(facts, uri, known))
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder) / CARD_FILE
        card.write_text(render_card(facts, uri, known))
        client.log_artifact(version.run_id, str(card), f"{name_artifact(version.name)}/{PIPELINE_FOLDER}")


def _read_facts(client: "MlflowClient", version: "ModelVersion") -> ModelFacts | None:
    """Return what a version said of its model when it was registered; None where it was registered before facts were kept."""
    if TITLE_TAG not in version.tags:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(version.run_id, f"{name_artifact(version.name)}/{FACTS_FILE}", folder)
        return ModelFacts.model_validate_json(Path(path).read_bytes())
