"""The real studio in a process of its own, with a registered model of random weights, and a browser that drives it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

_START_TIMEOUT_SECONDS = 400
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
def studio(tiny_pipeline, tmp_path_factory):
    from prompt_diffusion.registry import ModelFacts, register_folder
    from prompt_diffusion.settings import Settings

    pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")
    folder = tmp_path_factory.mktemp("studio")
    uri = f"sqlite:///{folder}/mlflow.db"
    settings = Settings(tracking_uri=uri, cache_dir=folder / "cache", store=str(folder / "store"))
    facts = ModelFacts(
        title="Random weights for tests", vision_tasks=("image_to_canny",), licences={"code": "Apache-2.0"}
    )
    reference = register_folder(Path(tiny_pipeline), settings, name="tiny", facts=facts).uri
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "PROMPT_DIFFUSION_CACHE_DIR": str(folder / "cache"),
        "PROMPT_DIFFUSION_STORE": str(folder / "store"),
    }
    command = [sys.executable, "-c", "from prompt_diffusion.cli import main; main()", "studio"]
    command += ["--model", "models:/tiny@challenger", "--port", str(port), "--device", "cpu"]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=folder)
    try:
        give_up = time.monotonic() + _START_TIMEOUT_SECONDS
        while "studio: http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, f"the studio did not start: {log.read_text()}"
            time.sleep(0.1)
        yield Studio(f"http://127.0.0.1:{port}", reference, uri, log)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def browser():
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
    page.set_default_timeout(240_000)  # the first image loads torch: seconds, or minutes on a busy machine
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
