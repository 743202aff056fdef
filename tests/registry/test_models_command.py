"""What the command line says of registered models."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from prompt_diffusion.cli import app
from prompt_diffusion.registry import ModelFacts, record_metrics, register_folder

TASKS = ("depth_to_image", "hed_to_image", "seg_to_image", "image_to_depth", "image_to_hed", "image_to_seg")


def run(*arguments, settings, width=100):
    environment = {
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "PROMPT_DIFFUSION_CACHE_DIR": str(settings.cache_dir),
        "COLUMNS": str(width),
    }
    return CliRunner().invoke(app, list(arguments), env=environment)


@pytest.fixture(scope="module")
def listed(settings, pipeline_folder, tmp_path_factory):
    """Two measured versions of one registered model."""
    facts = ModelFacts(title="Prompt Diffusion, 6 vision tasks")
    first = register_folder(pipeline_folder, settings, name="listed", facts=facts)
    copy = shutil.copytree(pipeline_folder, tmp_path_factory.mktemp("second") / "copy")
    schedule = copy / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("0.012", "0.014"))
    second = register_folder(copy, settings, name="listed", facts=facts)
    for version, value in ((first, 0.25), (second, 0.125)):
        metrics = {f"{'rmse' if task.startswith('image') else 'frechet_distance'}/{task}": value for task in TASKS}
        record_metrics(version, settings, metrics)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_models_lists_every_version_with_its_numbers_within_a_terminals_width(settings, listed, width):
    result = run("models", "listed", settings=settings, width=width)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in result.stdout
    rows = [line.split() for line in lines if line.strip()[:2] in ("1 ", "2 ")]
    assert [(row[0], row.count("0.25"), row.count("0.125")) for row in rows] == [("2", 0, 6), ("1", 6, 0)]
    assert rows[0][1] == "challenger"
    for text in ("Fréchet", "RMSE", "depth →", "image →", "Lower is better"):
        assert text in result.stdout


def test_models_prints_json(settings, listed):
    result = run("models", "listed", "--json", settings=settings)
    newest, oldest = json.loads(result.stdout)
    assert (newest["uri"], oldest["uri"]) == ("models:/listed/2", "models:/listed/1")
    assert newest["metrics"]["rmse/image_to_hed"] == 0.125
    assert {version["name"] for version in json.loads(run("models", "--json", settings=settings).stdout)} >= {"listed"}


def test_promote_makes_a_version_the_champion(settings, listed):
    result = run("promote", "models:/listed/1", settings=settings)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "models:/listed/1 is now champion: load it as models:/listed@champion\n"
    again = run("promote", "models:/listed@challenger", settings=settings)
    assert again.stdout.startswith("models:/listed/2 is now challenger, champion")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("models", "nothing"), "there is no registered model 'nothing'"),
        (("promote", "models:/listed/99"), "listed has the versions 1, 2"),
        (("promote", "models:/listed/1", "--alias", "no such/alias"), "refused"),
        (("promote", "listed"), "models:/NAME/VERSION"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(settings, listed, arguments, says):
    result = run(*arguments, settings=settings)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert result.stderr.startswith("prompt-diffusion: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["models", "promote"])
def test_help_shows_an_example(command, settings):
    assert f"Example: prompt-diffusion {command}" in run(command, "--help", settings=settings).stdout
