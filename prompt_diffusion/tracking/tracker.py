"""What a training tells MLflow, without ever waiting for it."""

import logging
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.storage import read_bytes
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, check_tracking_uri
from prompt_diffusion.tracking.delivery import Courier, find_folder
from prompt_diffusion.tracking.facts import collect_tags, flatten
from prompt_diffusion.tracking.outbox import Outbox

logger = logging.getLogger(__name__)

DELIVER_COMMAND = f"{Path(sys.executable).name} -m prompt_diffusion.tracking"
_MODEL_FILES = ("grid.png", "losses.parquet", "config.json")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_FINISH_SECONDS, _STOP_SECONDS = 60.0, 10.0

# What becomes of an event's numbers: the metric's name (MLflow's page groups by what stands before the slash) and its unit's
# size. What is the same at every step, or follows from the rest, makes no curve.
_METRICS = {
    "loss": ("loss", 1.0),
    "gradient_norm": ("gradient_norm", 1.0),
    "learning_rate_factor": ("schedule/learning_rate_factor", 1.0),
    "num_skipped": ("schedule/skipped_steps", 1.0),
    "samples_per_second": ("speed/samples_per_second", 1.0),
    "model_flops_per_second": ("speed/model_teraflop_per_second", 1e12),
    "device_memory_bytes": ("speed/device_memory_gigabytes", 1e9),
    "validation_loss": ("validation/loss", 1.0),
}


class RunTracker:
    """The MLflow run of one training, which goes on in the same run after every restart.

    Everything is written to an outbox on the local disk, and a thread sends it: a server that is away, now or at the start,
    costs the training nothing, and hears it all later, once. ValueError for a tracking URI that leads nowhere.
    """

    def __init__(
        self, settings: Settings, name: str, identity: StageIdentity, tags: Mapping[str, str] | None = None
    ) -> None:
        check_tracking_uri(settings.tracking_uri)
        self.outbox = Outbox(find_folder(settings), identity.fingerprint)
        self.outbox.open()
        params = flatten(identity.config) | flatten({"input": identity.digests})
        datasets = {role: digest for role, digest in identity.digests.items() if role != "base"}  # weights
        self.outbox.write({"run": name, "params": params, "datasets": datasets, "time": _now()})
        self._facts: dict[str, str] = {}
        self.set_tags({FINGERPRINT_TAG: identity.fingerprint, **collect_tags(), **(tags or {})})
        self._courier = Courier(settings, self.outbox)
        self._news, self._closing, self._give_up_at = threading.Event(), threading.Event(), float("inf")
        self._sender = threading.Thread(target=self._send_until_closed, name=f"tracker {name}", daemon=True)
        self._sender.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End a run that has not come to its end: failed for a user's mistake, otherwise stopped, to be gone on with."""
        if kind is not None:
            self._end("FAILED" if issubclass(kind, ValueError) else "KILLED", _STOP_SECONDS)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Say something of the run that has no step; the last word counts."""
        self._facts |= tags
        self.outbox.write({"tags": dict(tags)})

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Keep what the training reports, to be sent: a step, a validation with its grid, the hardware, the command."""
        tags = flatten({key: event[key] for key in ("hardware", "command", "gigaflop_per_sample") if event.get(key)})
        if event.get("is_best"):
            tags["best_step"] = str(event["step"])
        new = {key: value for key, value in tags.items() if self._facts.get(key) != value}
        if new:
            self.set_tags(new)
        if "step" in event:
            metrics = {name: event[key] / unit for key, (name, unit) in _METRICS.items() if event.get(key) is not None}
            metrics |= {f"loss/{label}": loss for label, loss in event.get("losses", {}).items()}
            if metrics:
                self.outbox.write({"metrics": metrics, "step": event["step"], "time": _now()})
        if event.get("grid_uri"):
            self.outbox.keep_file(f"validation/step-{event['step']:08d}.png", read_bytes(event["grid_uri"]))
        self._news.set()

    def finish(self, model: ManifestRef, limit_seconds: float = _FINISH_SECONDS) -> None:
        """Keep the last grid and the losses beside the metrics, end the run, and wait up to the limit until MLflow has all.

        Where it has not by then, a warning says how it will.
        """
        manifest = open_manifest(model.uri)
        for name in _MODEL_FILES:
            self.outbox.keep_file(name, manifest.read_file(name))
        self._end("FINISHED", limit_seconds)

    def _end(self, status: str, limit_seconds: float) -> None:
        self.outbox.write({"status": status, "time": _now()})
        self.outbox.close()
        self._give_up_at = time.monotonic() + limit_seconds
        self._closing.set()
        self._news.set()
        self._sender.join(limit_seconds)
        if not self._sender.is_alive():
            self.outbox.clear(self._courier.position)
        if self.outbox.path.exists():
            logger.warning(
                "MLflow has not heard all of this training yet: the rest is in %s, and is sent when a model is registered, "
                "when this training goes on, or by: %s",
                self.outbox.path,
                DELIVER_COMMAND,
            )

    def _send_until_closed(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            is_last = self._closing.is_set()
            try:
                self._courier.deliver()
            except Exception as error:  # whatever MLflow, its database or its artifact store raise: training goes on
                if pause == _FIRST_PAUSE_SECONDS:
                    logger.warning("MLflow is told later, from %s: %s", self.outbox.path, error)
                if time.monotonic() > self._give_up_at:
                    return
                # An end that waits for us is worth a try every second.
                time.sleep(1.0) if is_last else self._closing.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if pause > _FIRST_PAUSE_SECONDS:
                logger.warning(
                    "MLflow answers again and has heard all that it missed"
                )  # seen by whom the first was seen
            pause = _FIRST_PAUSE_SECONDS
            if is_last:
                return
            self._news.wait()
            self._news.clear()


def _now() -> int:
    """Return the time as MLflow has it: milliseconds since 1970."""
    return time.time_ns() // 1_000_000
