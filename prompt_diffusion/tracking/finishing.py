"""Ending the run of a training that is sealed, where the process that trained was killed before it could."""

import logging
import time

from prompt_diffusion.settings import Settings
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.tracking.client import connect, find_run, hide_password, knock
from prompt_diffusion.tracking.delivery import Courier, find_folder
from prompt_diffusion.tracking.outbox import Outbox

logger = logging.getLogger(__name__)

MODEL_FILES = ("grid.png", "losses.parquet", "config.json")
"""What of a sealed training lies beside its metrics."""


def finish_run(settings: Settings, model: ManifestRef) -> None:
    """End the run of a sealed training that still stands as running, or lacks the training's losses; else do nothing.

    Called by whoever finds a training sealed. Where MLflow cannot be asked, that is logged, and the next one does it.
    """
    outbox = Outbox(find_folder(settings), model.fingerprint)
    try:
        if outbox.path.exists():
            if any(record.get("status") == "FINISHED" for record in outbox.read(0)[0]):
                return  # it is ended there, and delivered with the rest
        elif not _is_unfinished(settings, model.fingerprint):
            return
        manifest = open_manifest(model.uri)
        outbox.open()
        for name in MODEL_FILES:
            outbox.keep_file(name, manifest.read_file(name))
        outbox.write({"status": "FINISHED", "time": time.time_ns() // 1_000_000})
        outbox.close()
        courier = Courier(settings, outbox)
        courier.deliver()
        outbox.clear(courier.position)
    except Exception as error:  # whatever MLflow, its database or its artifact store raise: the model is sealed
        logger.warning("the run of training %s is ended later: %s", model.fingerprint, hide_password(str(error)))
    else:
        logger.info("the run of training %s, whose process ended before it, is ended", model.fingerprint)


def _is_unfinished(settings: Settings, fingerprint: str) -> bool:
    """Say whether MLflow has a run of the training that was not ended, or did not hear what the training sealed."""
    knock(settings)
    client = connect(settings)
    run = find_run(client, fingerprint)
    if run is None:
        return False
    has_losses = any(file.path == "losses.parquet" for file in client.list_artifacts(run.info.run_id))
    return run.info.status != "FINISHED" or not has_losses
