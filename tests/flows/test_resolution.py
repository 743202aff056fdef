"""A run is resolved once: what its names mean at the start, they mean to the end, while the run itself moves an alias."""

from pathlib import Path

import pytest

import flows.run
from flows.embedded import find_train_identity
from flows.reproduce import reproduce
from flows.run import start_run
from prompt_diffusion.registry import fetch, register_folder
from prompt_diffusion.registry.facts import UNKNOWN, ModelFacts
from prompt_diffusion.settings import Settings, load_settings
from prompt_diffusion.store.manifest import open_manifest

CHALLENGER = "models:/prompt-diffusion@challenger"
FACTS = ModelFacts(title="tiny", source="a test", base=UNKNOWN)

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """A registry of this test's own, so that nobody else moves its aliases."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return load_settings()


def test_a_registered_base_is_looked_up_once_in_a_whole_reproduction_and_stays_what_it_was(
    settings: Settings, tiny_pipeline: str, tmp_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_folder(Path(tiny_pipeline), settings, facts=FACTS)
    asked: list[str] = []

    def ask(reference: str, settings: Settings) -> Path:
        asked.append(reference)
        return fetch(reference, settings)

    monkeypatch.setattr(flows.run, "fetch", ask)
    overrides = {
        "train.base": CHALLENGER,
        "train.noise.prediction_type": "v_prediction",
        "train.stem_channels": [4, 8, 8],
        "train.vision_tasks": ["image_to_depth"],
        "ingest.image_size": 32,
    }
    table = reproduce("smoke", overrides, tmp_store)
    assert asked == [CHALLENGER]
    bases = {open_manifest(str(folder)).identity.digests["base"] for folder in Path(tmp_store, "train").iterdir()}
    assert len(bases) == 1, "the joint model and its baseline start from one base"
    assert table.rows == 2
    # The training became the challenger: the same words mean another model now, and another training.
    moved = start_run("smoke", overrides, tmp_store)
    assert moved.config.train.base != str(fetch("models:/prompt-diffusion/1", settings).resolve())


def test_a_flow_that_reads_no_model_asks_no_registry(tmp_store: str) -> None:
    run = start_run("smoke", {"train.base": CHALLENGER}, tmp_store, needs_models=False)
    assert run.config.train.base == CHALLENGER


def test_a_forecast_writes_nothing_to_the_store(tmp_store: str) -> None:
    with pytest.raises(ValueError, match="is not sealed"):
        find_train_identity("smoke", {}, tmp_store)
    assert not Path(tmp_store).exists()
