"""What every flow starts with: a run, resolved once and passed down to every flow and stage below it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar

from prefect import Flow, flow

from prompt_diffusion.model.mirror import find_model
from prompt_diffusion.presets import RunConfig, build_preset
from prompt_diffusion.registry import fetch
from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.store.storage import check_writable
from prompt_diffusion.store.uris import local_path
from tasks.progress import PROGRESS

Preset = Literal["smoke", "demo", "paper"]
Overrides = dict[str, Any]  # a JSON object: Prefect builds the form from it
Upstream = Literal["make", "require"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One run of a flow: what to make, where it is kept, and what to do about a stage that is not sealed.

    It holds no name whose meaning may change during the run: models are local folders of checked content.
    """

    config: RunConfig
    settings: Settings
    store: str
    upstream: Upstream

    def making(self) -> Self:
        """Return the same run for the flow's own stages, which are made even if earlier stages are required."""
        return replace(self, upstream="make")

    def requiring(self) -> Self:
        """Return the same run with every stage required."""
        return replace(self, upstream="require")


def start_run(
    preset: str,
    overrides: Overrides | None,
    store: str | None,
    upstream: Upstream = "make",
    *,
    needs_models: bool = True,
    writes: bool = True,
) -> Run:
    """Resolve a run: check everything that a user can get wrong, and pin what it names to content.

    Configuration and store are checked before anything has started; a registered model, whose alias may move while the run
    goes on, and a mirrored one become local folders, unless the flow reads no model. A run that writes nothing does not
    probe the store. A mistake is a one-sentence ValueError.
    """
    settings = load_settings()
    config = build_preset(preset, overrides)
    root = store or settings.store
    folder = local_path(root)
    if folder is not None:
        root = str(Path(folder).resolve())  # references outlive this process and its working directory
    if writes:
        check_writable(root)
    return Run(pin_models(config, settings, root) if needs_models else config, settings, root, upstream)


def pin_models(config: RunConfig, settings: Settings, store: str) -> RunConfig:
    """Return the configuration with the registered or mirrored models that its trainings start from as local folders.

    A one-sentence ValueError for a registered model that does not exist or a mirrored file that was altered.
    """
    found: dict[str, str] = {}

    def find(reference: str) -> str:
        if reference not in found:  # once, so that a name means one thing throughout the run
            is_registered = reference.startswith("models:/")
            found[reference] = (
                str(fetch(reference, settings).resolve())
                if is_registered
                else find_model(reference, store, settings.cache_dir)
            )
        return found[reference]

    base, controlnet = find(config.train.base), config.train.controlnet
    changes = {
        "encode": config.encode.model_copy(update={"base": base}),
        "train": config.train.model_copy(
            update={"base": base, "controlnet": None if controlnet is None else find(controlnet)}
        ),
        "baselines": config.baselines.model_copy(
            update={"controlnets": {task: find(name) for task, name in config.baselines.controlnets.items()}}
        ),
    }
    return config.model_copy(update=changes)


def as_subflow(body: Callable[P, T], name: str, part: str | None = None) -> Flow[P, T]:
    """Return a flow that appears under its parent on Prefect's page, as that part, and takes what the parent resolved."""
    return flow(name=name, flow_run_name=part or name, validate_parameters=False)(body)


class Stopwatch:
    """Says which part of a run begins, and keeps how long each took."""

    def __init__(self, parts: Sequence[str]) -> None:
        """Take the names of the parts, in order."""
        self.parts = parts
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Record the seconds that the block takes under the part's name."""
        facts = {"part": part, "place": f"{self.parts.index(part) + 1}/{len(self.parts)}"}
        PROGRESS.debug("%s", part, extra=facts)
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started
        PROGRESS.debug("%s", part, extra={**facts, "seconds": self.seconds[part]})
