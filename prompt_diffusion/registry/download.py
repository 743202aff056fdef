"""From a reference to a local folder whose files are what was registered, and to a pipeline."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.registry.versions import SCHEME, find_version, say_registry
from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.store.fingerprint import compute_digest

if TYPE_CHECKING:
    import torch

    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

DIGESTS_FILE = "digests.json"
DIGEST_TAG = "digests_sha256"


def load(
    reference: str, settings: Settings | None = None, device: str = "cpu", dtype: "torch.dtype | None" = None
) -> "PromptDiffusionPipeline":
    """Load a pipeline: ``models:/name@alias``, ``models:/name/3``, or a folder that holds one.

    Raises:
        ValueError: In one sentence, a reference that leads nowhere, or files that are not what was registered.
    """
    from prompt_diffusion.model.pipeline import load_pipeline

    pipeline = load_pipeline(fetch(reference, settings or load_settings()), device)
    return pipeline if dtype is None else pipeline.to(dtype)


def fetch(reference: str, settings: Settings) -> Path:
    """Return a local folder with the pipeline of a registered model, its files checked; ValueError as ``load`` raises it."""
    if not reference.startswith(SCHEME):
        if not Path(reference).is_dir():
            raise ValueError(f"{reference!r} is neither a folder nor a registered model (models:/NAME@ALIAS)")
        return Path(reference)
    with say_registry(settings) as client:
        import mlflow

        version = find_version(client, reference)
        folder = Path(
            mlflow.artifacts.download_artifacts(artifact_uri=version.source, tracking_uri=settings.tracking_uri)
        )
    _check_digests(folder, version.tags[DIGEST_TAG], reference)
    return folder


def _check_digests(folder: Path, expected: str, reference: str) -> None:
    listing = (folder / DIGESTS_FILE).read_bytes()
    if compute_digest(listing) != expected:
        raise ValueError(f"{reference!r} was altered: {DIGESTS_FILE} is not what was registered")
    for path, digest in json.loads(listing).items():
        file = folder / path
        if not file.is_file() or compute_digest(file.read_bytes()) != digest:
            raise ValueError(f"{reference!r} was altered: {path} is not what was registered")
