"""From a reference to a local folder whose files are what was registered, and to a pipeline."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.device import choose_device
from prompt_diffusion.model.mirror import find_model
from prompt_diffusion.model.references import HUB_NAME, PIPELINE_FOLDER, fetch_repository, is_hub_reference
from prompt_diffusion.registry.artifact_store import find_local
from prompt_diffusion.registry.cache import MODELS, complete_copy, link_or_copy
from prompt_diffusion.registry.versions import DIGEST_TAG, SCHEME, TITLE_TAG, find_location, find_version, say_registry
from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.tracking.client import hide_password

if TYPE_CHECKING:
    import torch
    from mlflow.entities.model_registry import ModelVersion

    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline


def load(
    reference: str | Path,
    settings: Settings | None = None,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
) -> "PromptDiffusionPipeline":
    """Load a pipeline.

    Args:
        reference: ``models:/name@alias``, ``models:/name/3``, ``models:/name`` (its champion, or its challenger as long as
            there is no champion), a folder in diffusers' layout, or a hub's repository (``name`` or ``name@revision``).
        settings: Where the registry and the cache are; None reads the environment.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU where there is one.
        dtype: What to compute in, a type of torch or its name; None is float32.

    Raises:
        ValueError: In one sentence, a reference that leads nowhere, a registry that does not answer, or files that are not
            what was registered.
    """
    folder = fetch(str(reference), settings or load_settings())
    import torch  # nobody waits for it to hear of a mistyped reference

    from prompt_diffusion.model.load import load_pipeline

    return load_pipeline(folder, str(choose_device(device)), dtype or torch.float32)


def fetch(reference: str, settings: Settings) -> Path:
    """Return a local folder that holds a pipeline, as ``load`` takes it; ValueError as ``load`` raises it.

    A registered model's files are copied once to ``{cache_dir}/models``, and checked against their digests every time.
    """
    if reference.startswith(SCHEME):
        with say_registry(settings) as client:
            version = find_version(client, reference)
            place = find_pipeline(version, find_location(client, version))
        return _fetch_version(version, place, reference, settings)
    if reference and Path(reference).is_dir():
        return Path(reference)
    if not is_hub_reference(reference) or HUB_NAME.fullmatch(reference) is None:
        raise ValueError(
            f"{reference!r} is neither a folder nor a registered model (models:/NAME@ALIAS, models:/NAME/VERSION) nor a hub's "
            "repository (NAME/REPOSITORY)"
        )
    found = Path(find_model(reference, settings.store, settings.cache_dir))
    return found if found.is_dir() else fetch_repository(reference)


def find_pipeline(version: "ModelVersion", location: str) -> str:
    """Return the URI of the folder, in a version's artifact, that holds the pipeline and its digests."""
    # what was registered before there was a served model around the pipeline is the pipeline's folder itself
    return f"{location}/{PIPELINE_FOLDER}" if TITLE_TAG in version.tags else location


def _fetch_version(version: "ModelVersion", place: str, reference: str, settings: Settings) -> Path:
    digest = version.tags.get(DIGEST_TAG)
    if digest is None:
        raise ValueError(f"{reference!r} was not registered by this project: it has no digests, so it is not loaded")

    def fetch_file(path: str, target: Path) -> None:
        _fetch_artifact(f"{place}/{path}", target, settings, reference)

    return complete_copy(settings.cache_dir / MODELS, digest, fetch_file, reference)


def _fetch_artifact(uri: str, target: Path, settings: Settings, reference: str) -> None:
    local = find_local(uri)
    if local is not None:
        if local.is_file():
            link_or_copy(local, target)
        return  # a missing file is named by whoever checks its digest
    import mlflow

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        try:
            found = mlflow.artifacts.download_artifacts(
                artifact_uri=uri, dst_path=folder, tracking_uri=settings.tracking_uri
            )
        except Exception as error:  # whatever MLflow's client of that artifact store raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{reference!r} cannot be fetched from {hide_password(uri)}: {hide_password(reason)}"
            ) from error
        shutil.move(found, target)
