"""What every flow starts with: a configuration and a store that were checked before anything runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from prompt_diffusion.model.mirror import find_model
from prompt_diffusion.presets import RunConfig, build_preset
from prompt_diffusion.registry import fetch
from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.store.storage import check_writable, local_path

Preset = Literal["smoke", "demo", "paper"]
Overrides = dict[str, Any]
Upstream = Literal["make", "require"]


@dataclass(frozen=True)
class Run:
    """One run of a flow: what to make, where it is kept, and what to do about a stage that is not sealed."""

    config: RunConfig
    settings: Settings
    store: str
    upstream: Upstream

    def making(self) -> Self:
        """Return the same run for the flow's own stages, which are made whatever is asked of those before them."""
        return replace(self, upstream="make")


def start_run(preset: Preset, overrides: Overrides | None, store: str | None, upstream: Upstream = "make") -> Run:
    """Check everything that a user can get wrong; ValueError, one sentence, before anything has started."""
    settings = load_settings()
    config = build_preset(preset, overrides)
    root = store or settings.store
    folder = local_path(root)
    if folder is not None:
        root = str(Path(folder).resolve())  # references outlive this process and its working directory
    check_writable(root)
    return Run(config, settings, root, upstream)


def find_models(run: Run) -> Run:
    """Return the run with what its trainings start from found: a registered model or a mirrored one as a local folder.

    ValueError, one sentence, for a registered model that is not there and a mirror's file that was altered.
    """

    def find(reference: str) -> str:
        if reference.startswith("models:/"):
            return str(fetch(reference, run.settings).resolve())
        return find_model(reference, run.store, run.settings.cache_dir)

    config = run.config
    base = find(config.train.base)
    controlnet = None if config.train.controlnet is None else find(config.train.controlnet)
    controlnets = {task: find(reference) for task, reference in config.baselines.controlnets.items()}
    found = {
        "encode": config.encode.model_copy(update={"base": base}),
        "train": config.train.model_copy(update={"base": base, "controlnet": controlnet}),
        "baselines": config.baselines.model_copy(update={"controlnets": controlnets}),
    }
    return replace(run, config=config.model_copy(update=found))


class Stopwatch:
    """How long the parts of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Note the seconds that the block takes under the part's name."""
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started
