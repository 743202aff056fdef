"""A sealed training's run is ended by whoever finds it, and a user without a name trains."""

import os
import pwd
import shutil
from pathlib import Path

import pytest

from prompt_diffusion.engine.events import ValidationEvent
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.tracking import facts
from prompt_diffusion.tracking.client import connect, find_or_create_run, find_run
from prompt_diffusion.tracking.database import make_database
from prompt_diffusion.tracking.delivery import find_folder
from prompt_diffusion.tracking.finishing import finish_run
from prompt_diffusion.tracking.tracker import RunTracker

NAMES = {"grid.png", "losses.parquet", "config.json"}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "mlflow.db"
    make_database(path)
    return path


@pytest.fixture
def settings(database: Path, tmp_path: Path) -> Settings:
    shutil.copyfile(database, tmp_path / "mlflow.db")
    return Settings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", cache_dir=tmp_path / "cache")


IDENTITY = StageIdentity(stage="train", version=1, config={"a": 1}, inputs=())


@pytest.fixture
def model(tmp_path: Path) -> ManifestRef:
    store = str(tmp_path / "store")
    files = [write_file(IDENTITY, store, name, name.encode()) for name in sorted(NAMES)]
    return seal_manifest(IDENTITY, store, files, counts={"steps": 1})


def read(settings: Settings) -> tuple[str, set[str]]:
    client = connect(settings)
    run = find_run(client, IDENTITY.fingerprint)
    assert run is not None
    return run.info.status, {file.path for file in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_run_whose_process_died_right_after_the_seal_is_ended(
    settings: Settings, model: ManifestRef, same_machine: bool
) -> None:
    tracker = RunTracker(settings, "joint", IDENTITY)
    tracker.log_event(ValidationEvent(step=1, num_steps=1, loss=0.5, is_best=False))
    tracker._closing.set()  # as a kill leaves it: nothing more is said
    tracker._news.set()
    tracker._sender.join()
    tracker.outbox.close()
    assert read(settings) == ("RUNNING", set())
    if not same_machine:
        shutil.rmtree(find_folder(settings))
    finish_run(settings, model)
    assert read(settings) == ("FINISHED", NAMES)
    assert list(find_folder(settings).iterdir()) == []
    run = find_run(connect(settings), IDENTITY.fingerprint)
    assert run is not None
    assert (run.info.run_name, run.data.metrics["validation/loss"]) == ("joint", 0.5)


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "FINISHED"])
def test_a_run_that_lacks_what_was_sealed_is_completed(settings: Settings, model: ManifestRef, status: str) -> None:
    run_id, _ = find_or_create_run(connect(settings), settings, "x", model.fingerprint)
    connect(settings).set_terminated(run_id, status)
    finish_run(settings, model)
    assert read(settings) == ("FINISHED", NAMES)


def test_a_run_that_ended_stays_as_it_is_and_none_is_made(settings: Settings, model: ManifestRef) -> None:
    finish_run(settings, model)
    assert find_run(connect(settings), model.fingerprint) is None
    with RunTracker(settings, "joint", IDENTITY) as tracker:
        tracker.finish(model)
    run = find_run(connect(settings), model.fingerprint)
    finish_run(settings, model)
    again = find_run(connect(settings), model.fingerprint)
    assert run is not None
    assert again is not None
    assert again.info.end_time == run.info.end_time


def test_where_mlflow_is_away_a_sealed_training_is_still_found(
    settings: Settings, model: ManifestRef, caplog: pytest.LogCaptureFixture
) -> None:
    finish_run(settings.model_copy(update={"tracking_uri": "http://me:secret@127.0.0.1:1"}), model)
    assert "is ended later" in caplog.text
    assert "secret" not in caplog.text


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def refuse(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", refuse)
    assert facts.collect_tags()["mlflow.user"] == f"uid {os.getuid()}"
