"""What every flow starts with: a configuration and a store that were checked before anything runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from prompt_diffusion.presets import RunConfig, build_preset
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
