"""What a training logs to MLflow, without ever waiting for it."""

import logging
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from prompt_diffusion.engine.events import (
    ErrorEvent,
    Event,
    GridEvent,
    HardwareEvent,
    LaunchEvent,
    SealedEvent,
    StepEvent,
    ValidationEvent,
)
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.storage import read_bytes
from prompt_diffusion.tracking.client import FINGERPRINT_TAG, check_tracking_uri, hide_password
from prompt_diffusion.tracking.delivery import Courier, find_folder
from prompt_diffusion.tracking.facts import collect_tags, flatten
from prompt_diffusion.tracking.finishing import MODEL_FILES
from prompt_diffusion.tracking.outbox import Outbox

logger = logging.getLogger(__name__)

DELIVER_COMMAND = f"{Path(sys.executable).name} -m prompt_diffusion.tracking"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_FINISH_SECONDS, _STOP_SECONDS = 60.0, 10.0


class RunTracker:
    """The MLflow run of one training; after a restart the training continues in the same run.

    Everything is written to an outbox on the local disk, and a thread sends it: a server that is away, now or at the start,
    costs the training nothing, and receives everything later, once. ValueError for a malformed tracking URI.
    """

    def __init__(
        self, settings: Settings, name: str, identity: StageIdentity, tags: Mapping[str, str] | None = None
    ) -> None:
        check_tracking_uri(settings.tracking_uri)
        self.outbox = Outbox(find_folder(settings), identity.fingerprint)
        self.outbox.open()
        params = flatten(identity.config) | flatten({"input": identity.digests})
        # the base is weights, not data
        datasets = {role: digest for role, digest in identity.digests.items() if role != "base"}
        self.outbox.write({"run": name, "params": params, "datasets": datasets, "time": _now()})
        self._tags: dict[str, str] = {}
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
        """End the run of a training that did not finish: failed for a user's mistake, otherwise killed, to be resumed."""
        if kind is not None:
            self._end("FAILED" if issubclass(kind, ValueError) else "KILLED", _STOP_SECONDS)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        self._tags |= tags
        self.outbox.write({"tags": dict(tags)})

    def log_event(self, event: Event) -> None:
        """Keep what the training reports, to be sent: metrics of steps and validations, grids, hardware, command."""
        match event:
            case LaunchEvent():
                self._set_new_tags({"command": event.command})
            case HardwareEvent():
                self._set_new_tags(flatten({"hardware": event.model_dump(exclude={"kind"})}))
            case StepEvent():
                if event.gigaflop_per_sample is not None:  # it is the same at every step, so no curve
                    self._set_new_tags({"gigaflop_per_sample": str(event.gigaflop_per_sample)})
                self._log_metrics(event.step, _collect_metrics(event))
            case ValidationEvent():
                if event.is_best:
                    self._set_new_tags({"best_step": str(event.step)})
                self._log_metrics(event.step, {"validation/loss": event.loss})
            case GridEvent():
                self.outbox.keep_file(f"validation/step-{event.step:08d}.png", read_bytes(event.uri))
            case SealedEvent() | ErrorEvent():
                pass  # how a run ends is said by ``finish`` and ``__exit__``
        self._news.set()

    def finish(self, model: ManifestRef, limit_seconds: float = _FINISH_SECONDS) -> None:
        """Keep the model's grid, losses and configuration, end the run, and wait up to the limit until MLflow has everything.

        Where it does not by then, a warning says how the rest is delivered.
        """
        manifest = open_manifest(model.uri)
        for name in MODEL_FILES:
            self.outbox.keep_file(name, manifest.read_file(name))
        self._end("FINISHED", limit_seconds)

    def _set_new_tags(self, tags: Mapping[str, str]) -> None:
        new = {key: value for key, value in tags.items() if self._tags.get(key) != value}
        if new:
            self.set_tags(new)

    def _log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.outbox.write({"metrics": dict(metrics), "step": step, "time": _now()})

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
                "MLflow has not received all of this training yet: the rest is in %s, and is sent when a model is registered, "
                "when this training resumes, or by: %s",
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
                    logger.warning("MLflow is told later, from %s: %s", self.outbox.path, hide_password(str(error)))
                if time.monotonic() > self._give_up_at:
                    return
                # While the end of the training waits for this thread, it tries every second.
                time.sleep(1.0) if is_last else self._closing.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if pause > _FIRST_PAUSE_SECONDS:
                # a warning, too, so that whoever saw the first one sees this one
                logger.warning("MLflow answers again and has received everything that it missed")
            pause = _FIRST_PAUSE_SECONDS
            if is_last:
                return
            self._news.wait()
            self._news.clear()


def _collect_metrics(event: StepEvent) -> dict[str, float]:
    """Return a step's metrics by MLflow's names: its page groups them by what stands before the slash."""
    metrics = {
        "loss": event.loss,
        "gradient_norm": event.gradient_norm,
        "schedule/learning_rate_factor": event.learning_rate_factor,
        "schedule/skipped_steps": event.num_skipped,
        "speed/samples_per_second": event.samples_per_second,
        "speed/device_memory_gigabytes": event.device_memory_bytes / 1e9,
        **{f"loss/{label}": loss for label, loss in event.losses.items()},
    }
    if event.model_flops_per_second is not None:
        metrics["speed/model_teraflop_per_second"] = event.model_flops_per_second / 1e12
    return metrics


def _now() -> int:
    """Return the time as MLflow has it: milliseconds since 1970."""
    return time.time_ns() // 1_000_000
