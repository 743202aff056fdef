"""The pipeline of a sealed model, loaded once per process and device, and used by one caller at a time."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.device import choose_device
from prompt_diffusion.evaluation.config import EvaluateResources
from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.store.manifest import ManifestRef, open_manifest

if TYPE_CHECKING:
    import torch

    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

# A pipeline's scheduler has state, and PyTorch spreads one computation over all cores: threads that evaluate on one
# device take turns here.
_LOCKS: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
_MODELS_A_DEVICE = 2
"""A joint model and the baseline it stands beside, at most about 5 GB each for SD v1.5."""


@contextmanager
def reserve_device(resources: EvaluateResources) -> "Iterator[torch.device]":
    """Yield the device of the resources, and hold it: on one device, heavy computations run one after another."""
    import torch

    device = choose_device(resources.device)
    with _LOCKS[str(device)]:
        if resources.num_threads is not None:
            torch.set_num_threads(resources.num_threads)
        yield device


@contextmanager
def open_pipeline(model: ManifestRef, resources: EvaluateResources) -> "Iterator[PromptDiffusionPipeline]":
    """Yield the pipeline of a sealed model on the resources' device."""
    with reserve_device(resources) as device:
        yield _loader(str(device))(model.uri, model.fingerprint, resources.find_cache())


@cache
def _loader(device: str) -> "Callable[[str, str, Path], PromptDiffusionPipeline]":
    """Return what loads models onto a device and keeps the last ones there."""

    @lru_cache(maxsize=_MODELS_A_DEVICE)
    def load(uri: str, fingerprint: str, cache_dir: Path) -> "PromptDiffusionPipeline":
        from prompt_diffusion.model.load import load_pipeline

        manifest = open_manifest(uri)
        if manifest.ref.fingerprint != fingerprint:
            raise ValueError(f"{uri} holds the model {manifest.ref.fingerprint}, not {fingerprint}")
        return load_pipeline(manifest.fetch_folder(PIPELINE_FOLDER, cache_dir), device=device)

    return load
