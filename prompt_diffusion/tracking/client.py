"""MLflow's client: where it is, whether it answers, and the run that belongs to a training."""

import logging
import os
import re
import socket
import threading
from itertools import takewhile
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.database import find_database, make_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

logger = logging.getLogger(__name__)

EXPERIMENT = "prompt-diffusion"
FINGERPRINT_TAG = "fingerprint"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_KNOCK_SECONDS = 5
_MAX_EXPERIMENTS = 100
_LOCK = threading.Lock()  # of this process's threads one at a time makes the database, the experiment and a run


def check_tracking_uri(uri: str) -> None:
    """Raise ValueError, in one sentence, for a tracking URI that no server and no database can ever be behind."""
    try:
        parts = urlsplit(uri)
        has_place = bool(parts.hostname) and parts.port != 0  # the port of a malformed address raises ValueError
    except ValueError:  # its message holds a part of the address, which may be one of a password
        raise _refuse(uri, "its host or port is malformed") from None
    scheme = parts.scheme.partition("+")[0]
    if scheme in ("http", "https"):
        reason = None if has_place else "it names no host"
    elif scheme == "sqlite":
        reason = None if uri.partition("://")[2].strip("/") and not parts.netloc else "it names no file"
        if reason is None:
            find_database(uri)
    elif scheme in _DATABASES or uri == "databricks" or scheme == "databricks":
        reason = None
    else:
        reason = f"{scheme or uri!r} is neither a server's nor a database's scheme"
    if reason is not None:
        raise _refuse(uri, reason)


def _refuse(uri: str, reason: str) -> ValueError:
    return ValueError(
        f"MLFLOW_TRACKING_URI is {hide_password(uri)!r}: {reason}; expected http://HOST:PORT, https://HOST, sqlite:///FILE or "
        "postgresql://USER@HOST/DATABASE"
    )


def hide_password(text: str) -> str:
    """Return a text in which no address says who asks, and with which password."""
    return re.sub(r"://\S*@", "://***@", text)


def connect(settings: Settings) -> "MlflowClient":
    """Return a client of the tracking server or database that the settings name; a SQLite file that is missing is made.

    ValueError, in one sentence, for a file that is no database of MLflow's, or a half-made one.
    """
    check_tracking_uri(settings.tracking_uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # there would be one for each file
    with _LOCK:
        from mlflow import MlflowClient

        database = find_database(settings.tracking_uri)
        if database is not None:
            make_database(database)
        return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def knock(settings: Settings) -> None:
    """Raise ConnectionError within seconds where a tracking server does not answer or is not well, or a database's machine
    takes no connection.

    MLflow's own client would try for minutes, as its environment variables say; those stay as they are, for everybody else.
    """
    if not settings.tracking_uri.startswith(("http://", "https://")):
        _knock_database(settings.tracking_uri)
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    credentials = get_default_host_creds(settings.tracking_uri)
    try:
        answer = http_request(
            credentials, "/health", "GET", max_retries=0, timeout=_KNOCK_SECONDS, raise_on_status=False
        )
    except MlflowException as error:
        reason = error.__cause__ or error.__context__ or error
        raise ConnectionError(
            f"{hide_password(settings.tracking_uri)} does not answer ({type(reason).__name__})"
        ) from error
    if answer.status_code >= 500:
        raise ConnectionError(f"{hide_password(settings.tracking_uri)} answers with status {answer.status_code}")


def _knock_database(uri: str) -> None:
    parts = urlsplit(uri)
    port = parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if parts.hostname is None or port is None:
        return  # a file, or a database that is found by its driver's own means
    try:
        socket.create_connection((parts.hostname, port), _KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"{parts.hostname}:{port} does not answer ({error})") from error


def find_run(client: "MlflowClient", fingerprint: str) -> "Run | None":
    """Return the run that has the fingerprint, None where there is none, or only one that was deleted."""
    experiments = [experiment.experiment_id for experiment in _list_experiments(client) if _is_active(experiment)]
    if not experiments:
        return None  # MLflow would search all
    found: list[Run] = client.search_runs(experiments, f"tags.{FINGERPRINT_TAG} = '{fingerprint}'", max_results=1)
    return found[0] if found else None


def find_or_create_run(
    client: "MlflowClient", settings: Settings, name: str, fingerprint: str, start_time: int | None = None
) -> tuple[str, bool]:
    """Return the id of the run that has the fingerprint, and whether it was created now, under that name.

    It begins at ``start_time`` (milliseconds since 1970; None is now).
    """
    with _LOCK:
        found = find_run(client, fingerprint)
        if found is not None:
            return str(found.info.run_id), False
        experiment = _find_or_create_experiment(client, settings)
        run = client.create_run(experiment, start_time, tags={FINGERPRINT_TAG: fingerprint}, run_name=name)
        return str(run.info.run_id), True


def _list_experiments(client: "MlflowClient") -> "list[Experiment]":
    """Return our experiments: the first, and those that took its place when a person had deleted the one before."""
    names = [EXPERIMENT, *(f"{EXPERIMENT}-{number}" for number in range(2, _MAX_EXPERIMENTS))]
    return list(takewhile(lambda experiment: experiment is not None, map(client.get_experiment_by_name, names)))


def _is_active(experiment: "Experiment") -> bool:
    return bool(experiment.lifecycle_stage == "active")


def _find_or_create_experiment(client: "MlflowClient", settings: Settings) -> str:
    experiments = _list_experiments(client)
    active = next(filter(_is_active, experiments), None)
    if active is not None:
        return str(active.experiment_id)
    # MLflow keeps a deleted experiment's name for it, and it is not ours to restore what a person deleted
    name = f"{EXPERIMENT}-{len(experiments) + 1}" if experiments else EXPERIMENT
    if experiments:
        logger.warning("the experiment %s was deleted: new runs are in %s", experiments[-1].name, name)
    location = None  # a tracking server knows its own place for artifacts
    database = find_database(settings.tracking_uri)
    if database is not None:
        location = (database.parent / "mlartifacts").resolve().as_uri()
    return str(client.create_experiment(name, artifact_location=location))
