"""The pipeline of a sealed model, loaded once a process and used by one caller at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.evaluation.config import EvalResources
from prompt_diffusion.store.manifest import ManifestRef, open_manifest

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

# A pipeline's scheduler has state, and PyTorch spreads one computation over all cores: flows that evaluate in threads
# take turns here.
_DEVICE_LOCK = threading.RLock()


@contextmanager
def reserve_device(resources: EvalResources) -> Iterator[None]:
    """Hold this process's device: heavy computations run one after another."""
    with _DEVICE_LOCK:
        if resources.num_threads is not None:
            import torch

            torch.set_num_threads(resources.num_threads)
        yield


@contextmanager
def open_pipeline(model: ManifestRef, resources: EvalResources) -> "Iterator[PromptDiffusionPipeline]":
    """Give the pipeline of a sealed model, for the time of the block."""
    with reserve_device(resources):
        yield _load(model.uri, model.fingerprint, resources.cache_dir, resources.device)


# Two: a joint model and the baseline it stands beside, at most about 5 GB each for SD v1.5.
@lru_cache(maxsize=2)
def _load(uri: str, fingerprint: str, cache_dir: Path, device: str) -> "PromptDiffusionPipeline":
    from prompt_diffusion.model.load import load_pipeline

    manifest = open_manifest(uri)
    if manifest.ref.fingerprint != fingerprint:
        raise ValueError(f"{uri} holds the model {manifest.ref.fingerprint}, not {fingerprint}")
    return load_pipeline(manifest.fetch_folder("pipeline", cache_dir), device=device)
