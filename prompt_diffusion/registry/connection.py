"""The registry while it is written to: one writer of this machine at a time, and its errors in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prompt_diffusion.registry.cache import MODELS
from prompt_diffusion.registry.versions import first_line
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.local_files import hold
from prompt_diffusion.tracking.client import connect, hide_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@contextmanager
def open_registry(settings: Settings) -> Iterator["MlflowClient"]:
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


def search_ready(client: "MlflowClient", condition: str) -> "list[ModelVersion]":
    """Return the versions that meet a condition and are complete."""
    return [version for version in client.search_model_versions(condition) if version.status == "READY"]
