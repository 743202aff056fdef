"""Versions of registered models: finding the one that a reference names, listing them, and their aliases."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, connect, hide_password, knock
from prompt_diffusion.tracking.database import find_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
CHAMPION = "champion"
SCHEME = "models:/"
DIGEST_TAG = "digests_sha256"
METRIC_TAG = "metric."
TITLE_TAG, SOURCE_TAG, LICENCES_TAG, VISION_TASKS_TAG = "title", "source", "licences", "vision_tasks"


class RegisteredModel(FrozenModel):
    """A version of a registered model."""

    name: str
    """The registered model."""
    version: str
    """Its version."""
    alias: str | None
    """The alias that it was just given; None if none was."""
    run_id: str
    """The MLflow run that holds its metrics."""
    previous: str | None = None
    """The version that the alias pointed to before; None if there was none."""

    @property
    def uri(self) -> str:
        """What ``load`` takes."""
        return f"{SCHEME}{self.name}/{self.version}"


class ModelVersionSummary(FrozenModel):
    """What a list of models shows about one version."""

    name: str
    """The registered model."""
    version: str
    """Its version."""
    uri: str
    """What ``load`` takes."""
    aliases: tuple[str, ...]
    """The names that point to it."""
    created: datetime
    """When it was registered."""
    title: str
    """What the model is."""
    source: str
    """Where its weights came from."""
    fingerprint: str
    """The training's fingerprint, or the digest of an imported folder's files."""
    vision_tasks: tuple[str, ...]
    """The vision tasks that it was trained on."""
    licences: dict[str, str]
    """Licence by part."""
    metrics: dict[str, float]
    """Its measurements: ``{metric}/{vision task}`` of a benchmark cell, lower is better."""


@contextmanager
def say_registry(settings: Settings) -> Iterator["MlflowClient"]:
    """Yield a client of a registry that answers, and turn MLflow's errors into a one-sentence ValueError."""
    database = find_database(settings.tracking_uri)
    if database is not None and not database.is_file():
        raise ValueError(
            f"there is no registry yet: {database} does not exist (MLFLOW_TRACKING_URI); train a model first"
        )
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    address = hide_password(settings.tracking_uri)
    try:
        knock(settings)
        yield connect(settings)
    except ConnectionError as error:
        raise ValueError(f"the registry cannot be asked: {error}; start it or set MLFLOW_TRACKING_URI") from error
    except MlflowException as error:
        raise ValueError(f"the registry at {address} refused: {hide_password(first_line(error.message))}") from error
    except SQLAlchemyError as error:
        raise ValueError(
            f"the registry at {address} cannot be read: {hide_password(first_line(str(error)))}"
        ) from error


def find_version(client: "MlflowClient", reference: str) -> "ModelVersion":
    """Return the version that ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or ``models:/NAME`` names.

    A name alone means its champion, or its challenger if there is no champion. A one-sentence ValueError if the version
    does not exist, saying what does.
    """
    from mlflow.exceptions import MlflowException

    rest = reference.removeprefix(SCHEME)
    if rest == reference:
        raise ValueError(f"{reference!r} names no registered model: write models:/NAME/VERSION or models:/NAME@ALIAS")
    name, at, alias = rest.partition("@")
    if not at:
        name, _, number = rest.partition("/")
    try:
        model = client.get_registered_model(name)
    except MlflowException:
        names = ", ".join(model.name for model in client.search_registered_models()) or "none"
        raise ValueError(f"there is no registered model {reference!r}: registered are {names}") from None
    aliases: dict[str, str] = model.aliases
    if not at and not number:
        alias = CHAMPION if CHAMPION in aliases else CHALLENGER
    if at or not number:
        if alias not in aliases:
            raise ValueError(
                f"there is no registered model {reference!r}: {name} has {_list_aliases(aliases)}{_list_numbers(client, name)}"
            )
        number = aliases[alias]
    try:
        version: ModelVersion = client.get_model_version(name, number)
    except MlflowException:
        there = _list_numbers(client, name).removeprefix(", ") or "no version"
        raise ValueError(f"there is no registered model {reference!r}: {name} has {there}") from None
    return version


def find_location(client: "MlflowClient", version: "ModelVersion") -> str:
    """Return a version's artifact location, also for a copy, whose ``source`` names a version that may be gone or renamed."""
    location: str = client.get_model_version_download_uri(version.name, version.version)
    return location.rstrip("/")


def set_alias(reference: str, alias: str, settings: Settings) -> RegisteredModel:
    """Point an alias at a version; a one-sentence ValueError if the reference names none."""
    with say_registry(settings) as client:
        version = find_version(client, reference)
        previous = client.get_registered_model(version.name).aliases.get(alias)
        client.set_registered_model_alias(version.name, alias, version.version)
    return RegisteredModel(
        name=version.name,
        version=str(version.version),
        alias=alias,
        run_id=version.run_id,
        previous=None if previous is None else str(previous),
    )


def list_versions(settings: Settings, name: str | None = None) -> list[ModelVersionSummary]:
    """Return all versions, or those of one registered model, newest first; ValueError for a name that is not registered."""
    with say_registry(settings) as client:
        models = {model.name: model.aliases for model in client.search_registered_models()}
        if name is not None and name not in models:
            raise ValueError(f"there is no registered model {name!r}: registered are {', '.join(models) or 'none'}")
        versions = [
            _summarise(version, models[version.name])
            for each in ([name] if name is not None else models)
            for version in client.search_model_versions(f"name = '{each}'")
        ]
    return sorted(versions, key=lambda version: (version.created, int(version.version)), reverse=True)


def _summarise(version: "ModelVersion", aliases: dict[str, str]) -> ModelVersionSummary:
    tags = version.tags
    return ModelVersionSummary(
        name=version.name,
        version=str(version.version),
        uri=f"{SCHEME}{version.name}/{version.version}",
        aliases=tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))),
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        title=tags.get(TITLE_TAG, ""),
        source=tags.get(SOURCE_TAG, ""),
        fingerprint=tags.get(FINGERPRINT_TAG, ""),
        vision_tasks=tuple(tags[VISION_TASKS_TAG].split(", ")) if tags.get(VISION_TASKS_TAG) else (),
        licences=json.loads(tags.get(LICENCES_TAG, "{}")),
        metrics={key.removeprefix(METRIC_TAG): float(tags[key]) for key in sorted(tags) if key.startswith(METRIC_TAG)},
    )


def _list_aliases(aliases: dict[str, str]) -> str:
    named = ", ".join(f"{alias} (version {number})" for alias, number in sorted(aliases.items()))
    return f"the aliases {named}" if named else "no alias"


def _list_numbers(client: "MlflowClient", name: str) -> str:
    there = sorted((str(version.version) for version in client.search_model_versions(f"name = '{name}'")), key=int)
    return f", the versions {', '.join(there)}" if there else ""


def first_line(text: str) -> str:
    """Return the first line of what MLflow says: the rest is its stack."""
    return text.splitlines()[0] if text else "it gave no reason"
