"""The version of exactly these files: found and checked, or made."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.registry.artifact import name_artifact, write_artifact
from prompt_diffusion.registry.artifact_store import find_damage, upload
from prompt_diffusion.registry.cache import MODELS, digest_listing
from prompt_diffusion.registry.connection import search_ready
from prompt_diffusion.registry.facts import ModelFacts
from prompt_diffusion.registry.measurements import record
from prompt_diffusion.registry.versions import (
    DIGEST_TAG,
    LICENCES_TAG,
    SCHEME,
    SOURCE_TAG,
    TITLE_TAG,
    VISION_TASKS_TAG,
    find_location,
)
from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, find_or_create_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

_DESCRIPTION = "Prompt Diffusion: in-context vision tasks by example pairs."
_ROOM_PREFIX = "registering-"
_MAX_TAG = 5000  # the limit of MLflow's databases, in characters


def obtain_version(
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
    for version in search_ready(client, f"name = '{name}' and tags.{FINGERPRINT_TAG} = '{fingerprint}'"):
        if version.tags.get(DIGEST_TAG) != digest:
            continue  # retrained on another machine, for example: other weights are another version
        location = find_location(client, version)
        damaged = find_damage(location, digests, digest, settings) if TITLE_TAG in version.tags else []
        if damaged:
            logger.warning("%s%s/%s was altered (%s): uploading it again", SCHEME, name, version.version, damaged[0])
            with _make_room(settings) as root:
                write_artifact(root, stage(root), listing, digest, version.run_id)
                upload(location, root, settings)
            record(client, settings, version, {})
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


@contextmanager
def _make_room(settings: Settings) -> Iterator[Path]:
    """Yield a folder beside the cache: a model may be too large for the machine's temporary folder."""
    place = settings.cache_dir / MODELS
    for left in place.glob(f"{_ROOM_PREFIX}*"):  # left by a process that was killed: only one registers at a time
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=place, prefix=_ROOM_PREFIX) as folder:
        yield Path(folder) / "model"
