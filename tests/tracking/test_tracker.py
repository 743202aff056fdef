"""What a training tells MLflow arrives once, in order, whatever becomes of the server or of the process: a real server."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prompt_diffusion.engine.events import GridEvent, HardwareEvent, LaunchEvent, StepEvent, ValidationEvent
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.tracking.client import EXPERIMENT, check_tracking_uri, connect
from prompt_diffusion.tracking.delivery import find_folder
from prompt_diffusion.tracking.facts import find_revision, flatten
from prompt_diffusion.tracking.outbox import Outbox
from prompt_diffusion.tracking.tracker import RunTracker
from prompt_diffusion.training.launch import TrainingStoppedError
from tests.mlflow_server import Server
from tests.sharing import PATIENCE_SECONDS
from tests.store.fault_proxy import serve_fault_proxy

DEAD_URI = "http://127.0.0.1:1"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, make_mlflow_database: Callable[[Path], str]) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow-server"), make_mlflow_database)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    return Settings(tracking_uri=server.uri, cache_dir=tmp_path)


@pytest.fixture
def away(tmp_path: Path) -> Settings:
    """The same machine while MLflow is not to be reached."""
    return Settings(tracking_uri=DEAD_URI, cache_dir=tmp_path)


@pytest.fixture
def identity(request: pytest.FixtureRequest) -> StageIdentity:
    """A training of this test's own: its name moves the fingerprint."""
    config = {"optimizer": {"name": "adamw", "clip_norm": None}, "vision_tasks": ("a", "b"), "base": request.node.name}
    inputs = (
        StageInput(role="base", fingerprint="0" * 64),
        StageInput(role="pairs", stage="ingest", fingerprint="1" * 32),
        StageInput(role="maps/depth", stage="annotate", fingerprint="2" * 32),
    )
    return StageIdentity(stage="train", version=1, config=config, inputs=inputs)


@pytest.fixture
def model(identity: StageIdentity, tmp_path: Path) -> ManifestRef:
    store = str(tmp_path / "store")
    files = [write_file(identity, store, name, PNG) for name in ("grid.png", "losses.parquet", "config.json")]
    return seal_manifest(identity, store, files, counts={"steps": 9})


def make_event(step: int, loss: float | None = None) -> StepEvent:
    return StepEvent(
        step=step,
        num_steps=9,
        loss=float(step) if loss is None else loss,
        losses={"image_to_hed": 0.25 * step},
        gradient_norm=2.0,
        learning_rate_factor=0.5,
        num_skipped=0,
        samples_per_second=3.0,
        eta_seconds=1.0,
        device_memory_bytes=2_500_000_000,
        gigaflop_per_sample=618.0,
        model_flops_per_second=None,
    )


def find_runs(settings: Settings, identity: StageIdentity) -> list[Any]:
    client = connect(settings)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    return list(client.search_runs([experiment.experiment_id], f"tags.fingerprint = '{identity.fingerprint}'"))


def read_run(settings: Settings, identity: StageIdentity) -> Any:
    (run,) = find_runs(settings, identity)
    return run


def read_history(settings: Settings, identity: StageIdentity, key: str = "loss") -> list[tuple[int, float]]:
    run = read_run(settings, identity)
    return [(point.step, point.value) for point in connect(settings).get_metric_history(run.info.run_id, key)]


def test_a_run_has_the_trainings_configuration_inputs_hardware_and_metrics(
    settings: Settings, identity: StageIdentity, model: ManifestRef, tmp_path: Path
) -> None:
    hardware = HardwareEvent(
        device="NVIDIA H100", num_processes=8, threads_per_process=2, cpu_cores=16, memory_gigabytes=128.0
    )
    grid = tmp_path / "grid.png"
    grid.write_bytes(PNG)
    with RunTracker(settings, "Prompt Diffusion", identity, {"resources.compile": "True"}) as tracker:
        tracker.log_event(hardware)
        tracker.log_event(LaunchEvent(command="python -m prompt_diffusion.training.run run.json"))
        tracker.log_event(make_event(1))
        tracker.log_event(make_event(2, loss=float("nan")))
        tracker.log_event(GridEvent(step=2, num_steps=9, uri=str(grid)))
        tracker.log_event(ValidationEvent(step=2, num_steps=9, loss=0.75, is_best=True))
        grid.unlink()
        tracker.finish(model, PATIENCE_SECONDS)
    run = read_run(settings, identity)
    assert (run.info.run_name, run.info.status) == ("Prompt Diffusion", "FINISHED")
    expected = {"optimizer.name": "adamw", "optimizer.clip_norm": "None", "vision_tasks": "a, b"}
    expected |= {
        "base": identity.config["base"],
        "input.base": "0" * 64,
        "input.pairs": "1" * 32,
        "input.maps/depth": "2" * 32,
    }
    assert run.data.params == expected
    datasets = {used.dataset.name: used.dataset.digest for used in run.inputs.dataset_inputs}
    assert datasets == {"pairs": "1" * 32, "maps/depth": "2" * 32}
    expected = {"fingerprint": identity.fingerprint}
    expected |= {"hardware.device": "NVIDIA H100", "hardware.num_processes": "8", "resources.compile": "True"}
    expected |= {"hardware.threads_per_process": "2", "hardware.cpu_cores": "16", "hardware.memory_gigabytes": "128.0"}
    expected |= {"command": "python -m prompt_diffusion.training.run run.json", "best_step": "2"}
    expected |= {"gigaflop_per_sample": "618.0", "version.python": sys.version.split()[0]}
    assert run.data.tags.items() >= expected.items()
    assert {"version.torch", "version.diffusers", "version.transformers"} <= run.data.tags.keys()
    assert run.data.metrics["speed/device_memory_gigabytes"] == 2.5
    assert run.data.metrics["validation/loss"] == 0.75
    assert run.data.metrics["loss/image_to_hed"] == 0.5
    assert "speed/model_teraflop_per_second" not in run.data.metrics
    history = read_history(settings, identity)
    assert history[0] == (1, 1.0)
    assert history[1][0] == 2
    assert history[1][1] != history[1][1]
    client = connect(settings)
    assert [file.path for file in client.list_artifacts(run.info.run_id, "validation")] == [
        "validation/step-00000002.png"
    ]
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"config.json", "grid.png", "losses.parquet", "validation"}
    assert list(find_folder(settings).iterdir()) == []


def test_a_training_that_goes_back_to_its_checkpoint_adds_no_point_twice(
    settings: Settings, identity: StageIdentity, model: ManifestRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompt_diffusion.tracking.tracker._STOP_SECONDS", PATIENCE_SECONDS)
    with suppress(TrainingStoppedError), RunTracker(settings, "first", identity) as tracker:
        for step in range(1, 7):
            tracker.log_event(make_event(step))
        raise TrainingStoppedError("killed")
    stopped = read_run(settings, identity)
    assert stopped.info.status == "KILLED"
    with RunTracker(settings, "second", identity) as tracker:
        for step in range(4, 10):
            tracker.log_event(make_event(step, loss=-1.0 if step < 7 else None))
        tracker.finish(model, PATIENCE_SECONDS)
    finished = read_run(settings, identity)
    assert (finished.info.run_id, finished.info.status) == (stopped.info.run_id, "FINISHED")
    assert read_history(settings, identity) == [(step, float(step)) for step in range(1, 10)]


def test_what_a_killed_server_missed_arrives_once_and_in_order(
    server: Server,
    settings: Settings,
    identity: StageIdentity,
    model: ManifestRef,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), RunTracker(settings, "through an outage", identity) as tracker:
        for step in range(1, 41):
            if step == 10:
                wait_until(lambda: find_runs(settings, identity) and len(read_history(settings, identity)) == 9)
                server.kill()
            if step == 30:  # had any event before waited for the server, it would wait forever
                wait_until(lambda: "MLflow is told later" in caplog.text)
                server.start()
            tracker.log_event(make_event(step))
        tracker.finish(model, PATIENCE_SECONDS)
    assert read_history(settings, identity) == [(step, float(step)) for step in range(1, 41)]
    assert read_run(settings, identity).info.status == "FINISHED"
    assert list(find_folder(settings).iterdir()) == []
    said = [record.message for record in caplog.records if record.name.startswith("prompt_diffusion.tracking")]
    assert len(said) == 2
    assert str(tracker.outbox.path) in said[0]
    assert said[1].startswith("MLflow answers again")


def test_without_a_server_a_training_ends_with_a_warning_and_a_command_delivers_it_later(
    settings: Settings, away: Settings, identity: StageIdentity, model: ManifestRef, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.time_ns() // 1_000_000
    with RunTracker(away, "unheard", identity) as tracker:
        for step in range(1, 10):
            tracker.log_event(make_event(step))
        tracker.finish(model, limit_seconds=0.5)
    ended = time.time_ns() // 1_000_000
    warning = caplog.records[-1].message
    assert str(tracker.outbox.path) in warning
    assert "-m prompt_diffusion.tracking" in warning
    for uri, code in ((DEAD_URI, 1), (settings.tracking_uri, 0)):
        environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "PROMPT_DIFFUSION_CACHE_DIR": str(away.cache_dir)}
        command = [sys.executable, "-m", "prompt_diffusion.tracking"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        assert tracker.outbox.path.exists() == bool(code)
    assert read_history(settings, identity) == [(step, float(step)) for step in range(1, 10)]
    run = read_run(settings, identity)
    assert run.info.status == "FINISHED"
    points = connect(settings).get_metric_history(run.info.run_id, "loss")
    times = [run.info.start_time, *(point.timestamp for point in points), run.info.end_time]
    assert [began, *times, ended] == sorted([began, *times, ended]), "the time of an event is when it arrived"


DYING_PROGRAM = """
import os, signal, sys
from pathlib import Path
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.tracking.tracker import RunTracker
from tests.tracking.test_tracker import DEAD_URI, make_event

identity = StageIdentity.model_validate_json(sys.argv[1])
tracker = RunTracker(Settings(tracking_uri=DEAD_URI, cache_dir=Path(sys.argv[2])), "dies", identity)
for step in range(1, 6):
    tracker.log_event(make_event(step))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_tells_first_what_a_process_that_died_could_not(
    settings: Settings, identity: StageIdentity, model: ManifestRef
) -> None:
    command = [sys.executable, "-c", DYING_PROGRAM, identity.model_dump_json(), str(settings.cache_dir)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    outbox = Outbox(find_folder(settings), identity.fingerprint)
    with outbox.path.open("a") as file:
        file.write('{"metrics": {"loss": 6')  # as a process leaves it that dies within a write
    with RunTracker(settings, "goes on", identity) as tracker:
        for step in range(4, 10):
            tracker.log_event(make_event(step))
        tracker.finish(model, PATIENCE_SECONDS)
    assert read_history(settings, identity) == [(step, float(step)) for step in range(1, 10)]
    run = read_run(settings, identity)
    timestamps = [point.timestamp for point in connect(settings).get_metric_history(run.info.run_id, "loss")]
    assert timestamps == sorted(timestamps)


@pytest.mark.parametrize(
    ("fault", "method", "part"),
    [("lost answer", "POST", "runs/log-batch"), ("503", "GET", "health"), ("503", "POST", "runs/log-batch")],
    ids=["the answer to a batch is lost", "the server is unwell", "the database is unwell"],
)
def test_after_a_fault_each_point_stands_once(
    server: Server,
    settings: Settings,
    identity: StageIdentity,
    model: ManifestRef,
    fault: Any,
    method: str,
    part: str,
) -> None:
    with serve_fault_proxy(server.uri) as (proxy, url):
        proxy.add_fault(fault, method, part, 2)
        with RunTracker(settings.model_copy(update={"tracking_uri": url}), "through a proxy", identity) as tracker:
            for step in range(1, 10):
                tracker.log_event(make_event(step))
            tracker.finish(model, PATIENCE_SECONDS)
        assert proxy.num_faults == 2
        if part == "health":
            assert proxy.requests[:3] == [("GET", "/health")] * 3  # nothing is asked of a server that is unwell
    assert read_history(settings, identity) == [(step, float(step)) for step in range(1, 10)]


def test_an_outbox_is_cleared_only_when_nobody_writes_to_it(tmp_path: Path) -> None:
    outbox, other = Outbox(tmp_path, "f" * 32), Outbox(tmp_path, "f" * 32)
    outbox.open()
    outbox.write({"tags": {}})
    _, end = other.read(0)
    other.clear(end)
    assert outbox.path.exists()
    outbox.close()
    other.clear(end - 1)
    assert outbox.path.exists()
    other.clear(end)
    assert not outbox.path.exists()


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "mlruns",
        "./mlruns",
        "htp://host",
        "http://",
        "http://host:99999",
        "http://host:port",
        "sqlite://",
        "sqlite:///",
    ],
)
def test_a_malformed_tracking_uri_is_one_sentence_at_once(uri: str, identity: StageIdentity, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^MLFLOW_TRACKING_URI is .*; expected http://HOST:PORT") as caught:
        RunTracker(Settings(tracking_uri=uri, cache_dir=tmp_path), "nowhere", identity)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://[::1]:5000",
        "https://mlflow.example.org/path",
        "sqlite:///outputs/mlflow.db",
        "sqlite:////tmp/mlflow.db",
        "postgresql://user:secret@host/mlflow",
        "postgresql+psycopg2://host/mlflow",
        "databricks",
    ],
)
def test_a_sound_tracking_uri_is_taken(uri: str) -> None:
    check_tracking_uri(uri)


def test_the_revision_is_that_of_the_package_s_own_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    assert find_revision(package) == {}
    git("init", "--quiet")
    git("add", "package")
    git("commit", "--quiet", "-m", "first")
    (tmp_path / ".git" / "info" / "exclude").write_text("venv\n")
    clean = find_revision(package)
    assert (clean["git.revision"], clean["git.is_dirty"]) == (git("rev-parse", "HEAD"), "False")
    (package / "__init__.py").write_text("changed = True\n")
    assert find_revision(package)["git.is_dirty"] == "True"
    assert find_revision(installed) == {}


def test_nested_values_get_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": (1, 2)}) == {"a.b.c": "1", "a.d": "None", "e": "1, 2"}


def wait_until(is_so: Callable[[], object]) -> None:
    """Return once it is so: the limit of every test is the only one."""
    while not is_so():
        time.sleep(0.1)
