"""What is said before the page opens: a port that is taken, an extra or a model that is missing."""

import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.cli import app


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
