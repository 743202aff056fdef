"""The real studio in a process of its own, with a registered model of random weights, and a browser that drives it."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sharing import PATIENCE_SECONDS, find_free_ports, start_server, stop_server

_CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass(frozen=True)
class Studio:
    """A running studio."""

    address: str
    reference: str
    """The registered model that it was started with."""
    tracking_uri: str
    log: Path


@pytest.fixture(scope="session")
def studio(tiny_pipeline, tmp_path_factory, make_mlflow_database):
    from prompt_diffusion.registry import ModelFacts, register_folder
    from prompt_diffusion.settings import Settings

    pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")
    folder = tmp_path_factory.mktemp("studio")
    uri = make_mlflow_database(folder)
    settings = Settings(tracking_uri=uri, cache_dir=folder / "cache", store=str(folder / "store"))
    facts = ModelFacts(
        title="Random weights for tests", vision_tasks=("image_to_canny",), licences={"code": "Apache-2.0"}
    )
    reference = register_folder(Path(tiny_pipeline), settings, name="tiny", facts=facts).uri
    port = 0

    def build_command():
        nonlocal port
        (port,) = find_free_ports()
        command = [sys.executable, "-c", "from prompt_diffusion.cli import main; main()", "studio"]
        return [*command, "--model", "models:/tiny@challenger", "--port", str(port), "--device", "cpu"]

    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "PROMPT_DIFFUSION_CACHE_DIR": str(folder / "cache"),
        "PROMPT_DIFFUSION_STORE": str(folder / "store"),
    }
    log = folder / "log"
    process = start_server(build_command, environment, log, lambda: "studio: http" in log.read_text())
    yield Studio(f"http://127.0.0.1:{port}", reference, uri, log)
    stop_server(process)


@pytest.fixture
def settings(tmp_path):
    from prompt_diffusion.settings import Settings

    return Settings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", cache_dir=tmp_path, store=str(tmp_path))


@pytest.fixture
def actions(settings, tiny_pipeline, tmp_path, monkeypatch):
    """Return what the page's buttons do, for one model, on a page that others can reach."""
    from prompt_diffusion.studio.actions import Actions
    from prompt_diffusion.studio.maps import StudioAnnotators
    from prompt_diffusion.studio.models import ModelShelf

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    return Actions(ModelShelf(settings, tiny_pipeline, "cpu", takes_folders=False), StudioAnnotators(settings, "cpu"))


@pytest.fixture
def make(actions, scene_files):
    """Return what presses Generate with a query and these fields."""
    from prompt_diffusion.studio.history import History

    def press(fields, history=None, on_step=lambda done, total: None, visitor="someone"):
        inputs = {"query": str(scene_files["query"]), "example_1_source": None, "example_1_target": None}
        return actions.make(fields, inputs, history or History(), visitor, on_step)

    return press


@pytest.fixture(scope="module")
def browser():
    """Start a browser. Its driver runs an event loop in this thread until it stops: a test file's end, no later."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser: the package playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no browser: the system package chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=_CHROMIUM_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, studio):
    """Open the page as a new visitor; nothing that it does may ask another machine, or fail in a script."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE_SECONDS)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(studio.address)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    page.locator("#query input[type=file]").wait_for(state="attached")
    yield page
    context.close()
    elsewhere = [url for url in asked if not url.startswith((studio.address, "data:", "blob:"))]
    assert asked
    assert elsewhere == []
    assert failed == []
