"""From an outbox to MLflow: in order, each point once, however often it is tried.

Two rules make it so. A record keeps the time at which it was written, and MLflow's store holds a row of the same key, time,
step and value once: sending a batch again whose answer was lost adds nothing. And of each metric only what lies beyond the
last step that MLflow has is sent: a training that goes back to its checkpoint tells some steps twice, and the first stands.
"""

import json
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.client import check_tracking_uri, connect, find_or_create_run, hide_password, knock
from prompt_diffusion.tracking.outbox import Outbox, Record, list_outboxes

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# MLflow's own limits
_MAX_METRICS_PER_BATCH = 1000
_MAX_TAGS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 8000
_MAX_DIGEST_LENGTH = 36


class Courier:
    """Takes the records of one outbox to MLflow."""

    def __init__(self, settings: Settings, outbox: Outbox) -> None:
        self.settings, self.outbox, self.position = settings, outbox, 0
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._last_steps: dict[str, int] = {}

    def deliver(self) -> None:
        """Send all that has been written since the last time; whatever MLflow or the network raise, nothing is lost."""
        knock(self.settings)
        try:
            client = self._client or self._attach()
            records, end = self.outbox.read(self.position)
            for kind, group in groupby(records, key=_find_kind):
                _SENDERS[kind](self, client, list(group))
        except BaseException:
            self._client = None  # ask again what MLflow has: it may have heard more than it could confirm
            raise
        self.position = end

    def _attach(self) -> "MlflowClient":
        """Find or make the training's run, and ask how far each of its metrics has come."""
        client, fingerprint = connect(self.settings), self.outbox.fingerprint
        began = next((record["time"] for record in self.outbox.read(0)[0] if "run" in record), None)
        self._run_id, is_new = find_or_create_run(client, self.settings, f"train-{fingerprint[:8]}", fingerprint, began)
        if is_new:
            self.position = 0
        keys = client.get_run(self._run_id).data.metrics
        self._last_steps = {
            key: max(point.step for point in client.get_metric_history(self._run_id, key)) for key in keys
        }
        self._client = client
        return client

    def _begin(self, client: "MlflowClient", records: Sequence[Record]) -> None:
        """Say what is trained on what: an attempt's name, its parameters (which never change) and its inputs."""
        from mlflow.entities import Dataset, DatasetInput, Param

        known = client.get_run(self._run_id).data.params
        for record in records:
            client.update_run(self._run_id, status="RUNNING", name=record["run"])
            new = [Param(key, value[:_MAX_PARAM_LENGTH]) for key, value in record["params"].items() if key not in known]
            known |= record["params"]
            for start in range(0, len(new), _MAX_TAGS_PER_BATCH):
                client.log_batch(self._run_id, params=new[start : start + _MAX_TAGS_PER_BATCH])
            datasets = [
                Dataset(role, fingerprint[:_MAX_DIGEST_LENGTH], "manifest", json.dumps({"fingerprint": fingerprint}))
                for role, fingerprint in record["datasets"].items()
            ]
            client.log_inputs(self._run_id, [DatasetInput(dataset) for dataset in datasets])

    def _tag(self, client: "MlflowClient", records: Sequence[Record]) -> None:
        from mlflow.entities import RunTag

        tags = {key: value for record in records for key, value in record["tags"].items()}
        new = [RunTag(key, value[:_MAX_TAG_LENGTH]) for key, value in tags.items()]
        for start in range(0, len(new), _MAX_TAGS_PER_BATCH):
            client.log_batch(self._run_id, tags=new[start : start + _MAX_TAGS_PER_BATCH])

    def _log(self, client: "MlflowClient", records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        points = []
        for record in records:
            for key, value in record["metrics"].items():
                if record["step"] > self._last_steps.get(key, -1):
                    points.append(Metric(key, value, record["time"], record["step"]))
                    self._last_steps[key] = record["step"]
        for start in range(0, len(points), _MAX_METRICS_PER_BATCH):
            client.log_batch(self._run_id, metrics=points[start : start + _MAX_METRICS_PER_BATCH])

    def _upload(self, client: "MlflowClient", records: Sequence[Record]) -> None:
        for record in records:
            artifact = record["artifact"]
            file = self.outbox.file(artifact)
            if not file.exists():
                continue  # it went with an earlier try
            client.log_artifact(self._run_id, str(file), artifact.rpartition("/")[0] or None)
            file.unlink(missing_ok=True)

    def _end(self, client: "MlflowClient", records: Sequence[Record]) -> None:
        client.set_terminated(self._run_id, records[-1]["status"], end_time=records[-1]["time"])


_SENDERS: dict[str, Callable[[Courier, "MlflowClient", Sequence[Record]], None]] = {
    "run": Courier._begin,
    "tags": Courier._tag,
    "metrics": Courier._log,
    "artifact": Courier._upload,
    "status": Courier._end,
}


def _find_kind(record: Record) -> str:
    return next(kind for kind in _SENDERS if kind in record)


def deliver_outboxes(settings: Settings) -> list[Outbox]:
    """Deliver what trainings on this machine could not, and return the outboxes of which something is still left.

    ValueError for a tracking URI that leads nowhere.
    """
    check_tracking_uri(settings.tracking_uri)
    left = []
    for outbox in list_outboxes(find_folder(settings)):
        courier = Courier(settings, outbox)
        try:
            courier.deliver()
        except Exception as error:  # whatever MLflow, its database or its artifact store raise: the others go on
            logger.warning("MLflow is told later, from %s: %s", outbox.path, hide_password(str(error)))
            left.append(outbox)
        else:
            outbox.clear(courier.position)
            logger.info("MLflow has heard all of training %s", outbox.fingerprint)
    return left


def find_folder(settings: Settings) -> Path:
    """Return the folder of this machine's outboxes."""
    return settings.cache_dir / "tracking"
