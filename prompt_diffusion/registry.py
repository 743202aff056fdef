"""MLflow's registered models, and loading them back; what a training tells MLflow meanwhile is in ``tracking``.

Nothing that an artifact holds is ever executed: a model is safetensors and JSON, checked against digests, read by our own
loader.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, connect, find_or_create_run
from prompt_diffusion.tracking.delivery import deliver_outboxes
from prompt_diffusion.tracking.tracker import RunTracker
from prompt_diffusion.training.stage import PIPELINE_FOLDER

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

logger = logging.getLogger(__name__)

__all__ = [
    "CHALLENGER",
    "RegisteredModel",
    "RunTracker",
    "connect",
    "load",
    "record_metrics",
    "register_model",
]

CHALLENGER = "challenger"
_DIGESTS_FILE = "digests.json"
_DIGEST_TAG = "digests_sha256"
_LOCK = threading.Lock()  # two threads with the same model make one version


class RegisteredModel(BaseModel):
    """A version of a registered model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """The registered model."""
    version: str
    """Its version."""
    alias: str
    """The alias that was given to it."""
    run_id: str
    """MLflow's run, where its metrics stand."""

    @property
    def uri(self) -> str:
        """What ``load`` takes."""
        return f"models:/{self.name}/{self.version}"


def register_model(
    model: ManifestRef, settings: Settings, metrics: Mapping[str, float] | None = None, alias: str = CHALLENGER
) -> RegisteredModel:
    """Make a sealed training a model version and give it the alias; the same model is registered once.

    The version carries the training's fingerprint, the fingerprints of its inputs, and digests of every file. What trainings
    could not tell MLflow when it was away is delivered first.
    """
    deliver_outboxes(settings)
    with _LOCK:
        client = connect(settings)
        name = settings.registered_model
        version = _find_version(client, name, model.fingerprint) or _create_version(client, settings, model)
        client.set_registered_model_alias(name, alias, version.version)
    registered = RegisteredModel(name=name, version=str(version.version), alias=alias, run_id=version.run_id)
    if metrics:
        record_metrics(registered, settings, metrics)
    return registered


def record_metrics(model: RegisteredModel, settings: Settings, metrics: Mapping[str, float]) -> None:
    """Add numbers, such as benchmark cells, to a model version: to its run, and as tags to be read beside it."""
    client = connect(settings)
    for name, value in metrics.items():
        client.log_metric(model.run_id, name, value)
        client.set_model_version_tag(model.name, model.version, f"metric.{name}", f"{value:.6g}")


def load(reference: str, settings: Settings | None = None, device: str = "cpu") -> "PromptDiffusionPipeline":
    """Load a pipeline: ``models:/name@alias``, ``models:/name/3``, or a folder that holds one.

    Raises:
        ValueError: In one sentence, a reference that leads nowhere, or files that are not what was registered.
    """
    from prompt_diffusion.model.pipeline import load_pipeline

    if not reference.startswith("models:/"):
        if not Path(reference).is_dir():
            raise ValueError(f"{reference!r} is neither a folder nor a registered model (models:/NAME@ALIAS)")
        return load_pipeline(Path(reference), device)
    return load_pipeline(_download(reference, settings or load_settings()), device)


def fetch(reference: str, settings: Settings) -> Path:
    """Return a local folder with the pipeline of a registered model, its files checked; ValueError as ``load`` raises it."""
    return _download(reference, settings)


def _find_version(client: "MlflowClient", name: str, fingerprint: str) -> "ModelVersion | None":
    # a name that is not registered yet has no versions: an empty list
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(FINGERPRINT_TAG) == fingerprint and version.status == "READY":
            found: ModelVersion = version
            return found
    return None


def _create_version(client: "MlflowClient", settings: Settings, model: ManifestRef) -> "ModelVersion":
    """Upload the pipeline with its digests, and make it a version."""
    from mlflow.exceptions import MlflowException

    manifest = open_manifest(model.uri)
    prefix = f"{PIPELINE_FOLDER}/"
    digests = {f.path.removeprefix(prefix): f.sha256 for f in manifest.files if f.path.startswith(prefix)}
    listing = json.dumps(digests, indent=2, sort_keys=True).encode()
    run_id, _ = find_or_create_run(client, settings, f"train-{model.fingerprint[:8]}", model.fingerprint)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = manifest.fetch_folder(PIPELINE_FOLDER, Path(folder))
        (pipeline / _DIGESTS_FILE).write_bytes(listing)
        client.log_artifacts(run_id, str(pipeline), PIPELINE_FOLDER)
    client.set_terminated(run_id)
    name = settings.registered_model
    try:
        client.create_registered_model(name, description="Prompt Diffusion: in-context vision tasks by example pairs.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {FINGERPRINT_TAG: model.fingerprint, _DIGEST_TAG: compute_digest(listing)}
    tags |= {f"input.{role}": fingerprint for role, fingerprint in manifest.identity.inputs.items()}
    source = f"{client.get_run(run_id).info.artifact_uri}/{PIPELINE_FOLDER}"
    version: ModelVersion = client.create_model_version(name, source, run_id, tags=tags)
    return version


def _download(reference: str, settings: Settings) -> Path:
    """Return a local folder with the files of a model version, each checked against the digests it was registered with."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    name, _, rest = reference.removeprefix("models:/").partition("@")
    try:
        if rest:
            version = client.get_model_version_by_alias(name, rest)
        else:
            name, _, number = name.partition("/")
            version = client.get_model_version(name, number)
    except MlflowException as error:
        raise ValueError(
            f"there is no registered model {reference!r} at {settings.tracking_uri} ({error.message.splitlines()[0]})"
        ) from error
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=version.source, tracking_uri=settings.tracking_uri))
    _check_digests(folder, version.tags[_DIGEST_TAG], reference)
    return folder


def _check_digests(folder: Path, expected: str, reference: str) -> None:
    listing = (folder / _DIGESTS_FILE).read_bytes()
    if compute_digest(listing) != expected:
        raise ValueError(f"{reference!r} was altered: {_DIGESTS_FILE} is not what was registered")
    for path, digest in json.loads(listing).items():
        file = folder / path
        if not file.is_file() or compute_digest(file.read_bytes()) != digest:
            raise ValueError(f"{reference!r} was altered: {path} is not what was registered")
