"""What a browser cannot show: other addresses, other models, a run that is stopped, a port that is taken."""

import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

gradio = pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.cli import app  # noqa: E402
from prompt_diffusion.registry import ModelVersionSummary  # noqa: E402
from prompt_diffusion.settings import Settings  # noqa: E402
from prompt_diffusion.studio.actions import Actions  # noqa: E402
from prompt_diffusion.studio.history import History, Result  # noqa: E402
from prompt_diffusion.studio.limits import MAX_HISTORY  # noqa: E402
from prompt_diffusion.studio.maps import StudioAnnotators  # noqa: E402
from prompt_diffusion.studio.models import ModelShelf  # noqa: E402
from prompt_diffusion.studio.models_tab import tabulate  # noqa: E402
from prompt_diffusion.studio.toasts import StoppedError, toast_errors  # noqa: E402


@pytest.fixture
def settings(tmp_path):
    return Settings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", cache_dir=tmp_path, store=str(tmp_path))


@pytest.fixture
def actions(settings, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    return Actions(ModelShelf(settings, tiny_pipeline, "cpu", takes_folders=False), StudioAnnotators(settings, "cpu"))


def make(actions, fields, scene_files, history=None, on_step=lambda done, total: None, visitor="someone"):
    inputs = {"query": str(scene_files["query"]), "example_1_source": None, "example_1_target": None}
    return actions.make(fields, inputs, history or History(), visitor, on_step)


def test_stop_ends_the_visitor_s_own_run_at_its_next_step(actions, scene_files, tiny_pipeline):
    fields = {"model": tiny_pipeline, "num_inference_steps": 50, "seed": 1}
    steps, stopped = [], threading.Event()

    def step(done, total):
        steps.append(done)
        if done == 2:
            actions.stop("someone else")
        if done == 4:
            actions.stop("someone")
            stopped.set()

    with pytest.raises(StoppedError):
        make(actions, fields, scene_files, on_step=step)
    assert stopped.is_set()
    assert steps[-1] == 4
    result, _, history = make(actions, fields | {"num_inference_steps": 1}, scene_files)
    assert history.results == (result,)


def test_a_page_that_others_can_reach_loads_no_folder_but_its_own(actions, scene_files, tiny_base):
    with pytest.raises(ValueError, match="takes registered models alone"):
        make(actions, {"model": tiny_base}, scene_files)


def test_a_run_is_bounded(actions, scene_files, tiny_pipeline):
    with pytest.raises(ValueError, match="up to 200 steps, got 201"):
        make(actions, {"model": tiny_pipeline, "num_inference_steps": 201}, scene_files)
    with pytest.raises(ValueError, match="up to 1024 pixels a side, got 2048"):
        make(actions, {"model": tiny_pipeline, "size": 2048}, scene_files)


def test_the_history_forgets_the_oldest_and_shows_two_side_by_side(actions, scene_files, tiny_pipeline):
    result, _, _ = make(actions, {"model": tiny_pipeline, "num_inference_steps": 1}, scene_files)
    results = [Result(f"{n}.png", result.record, result.model, {}) for n in range(MAX_HISTORY + 2)]
    history = History()
    for each in results:
        history = history.add(each)
    assert [each.file for each in history.results] == [f"{n}.png" for n in range(MAX_HISTORY + 1, 1, -1)]
    chosen = history.show(0).show(3)
    assert (chosen.left, chosen.right) == (history.results[0], history.results[3])
    assert chosen.show(3) == chosen


def test_an_annotator_without_its_weights_is_refused_at_once(actions, scene_files):
    choices, default = actions.maps.list_annotators("depth")
    assert ("depth_midas (weights are not here)", "depth_midas") in choices
    with pytest.raises(ValueError, match="fetch them once with `prompt-diffusion weights mirror depth_midas`"):
        actions.make_map(str(scene_files["query"]), default)


def test_a_message_cannot_bring_markup_into_the_page():
    @toast_errors
    def fail():
        raise ValueError("<img src=x onerror=alert(1)> is no image")

    with pytest.raises(gradio.Error) as caught:
        fail()
    assert caught.value.message == "&lt;img src=x onerror=alert(1)&gt; is no image"


def test_the_table_of_versions_has_a_column_for_each_metric_and_none_that_is_empty():
    def version(number, **metrics):
        return ModelVersionSummary(
            name="m",
            version=number,
            uri=f"models:/m/{number}",
            aliases=(),
            created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
            title="",
            source="",
            fingerprint="",
            vision_tasks=(),
            licences={},
            metrics=metrics,
        )

    headers, rows = tabulate([version("2", **{"rmse/image_to_hed": 0.1}), version("1")])
    assert headers == ["model", "version", "registered (UTC)", "RMSE image → hed"]
    assert rows == [["m", "2", "2026-01-02 03:04", "0.1"], ["m", "1", "2026-01-02 03:04", ""]]


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["studio", "--port", str(port)])
    assert result.exit_code == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_gradio_the_extra_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'gradio' else find(name, *rest)\n"
    )
    code = f"exec(open({str(tmp_path / 'sitecustomize.py')!r}).read())\nfrom prompt_diffusion.cli import main\nmain()"
    result = subprocess.run([sys.executable, "-c", code, "studio"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "needs the extra 'studio'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_does_not_exist_is_said_before_the_page_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    result = CliRunner().invoke(app, ["studio", "--model", "models:/none@champion"])
    assert result.exit_code == 2
    assert "there is no registry yet" in result.stderr


def test_the_command_line_loads_neither_torch_nor_gradio():
    code = "import sys; import prompt_diffusion.cli; sys.exit(len({'torch', 'gradio', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
