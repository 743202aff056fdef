"""The commands of README and docs: every one is understood, and those on the samples run as written."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from skimage import data
from typer.testing import CliRunner

from prompt_diffusion.cli import app
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.data.transforms import decode_image
from prompt_diffusion.registry import register_folder
from prompt_diffusion.registry.facts import UNKNOWN, ModelFacts
from prompt_diffusion.settings import load_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"^(?:\.venv/bin/)?prompt-diffusion ")
RUN = ("annotate", "edit", "generate", "settings")


def read_commands(page):
    """Return the words of each of our commands in a page's blocks of shell, without its program and comments."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(PROGRAM.sub("", line), comments=True) for line in lines if PROGRAM.match(line)]


COMMANDS = [(page.name, words) for page in PAGES for words in read_commands(page)]


def test_there_are_commands():
    assert len(COMMANDS) >= 25
    assert {words[0] for _, words in COMMANDS} >= {*RUN, "demo", "train", "studio", "models", "promote"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_documented_command_has_only_arguments_that_exist(page, words):
    command, context = typer.main.get_command(app), None
    while hasattr(command, "get_command"):
        context = typer.Context(command, parent=context)
        found = command.get_command(context, words[0])
        assert found is not None, f"{page} names a command {words[0]!r}"
        command, words = found, words[1:]
    command.make_context(command.name, list(words), parent=context)


@pytest.mark.parametrize("page", ["README.md", "studio.md"])
def test_commands_on_the_samples_run_as_they_are_written(
    page, tiny_pipeline, make_mlflow_database, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_mlflow_database(tmp_path / "outputs"))
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "samples", "samples")
    facts = ModelFacts(title="tiny", source="a test", base=UNKNOWN)
    register_folder(Path(tiny_pipeline), load_settings(), facts=facts)
    commands = [words for name, words in COMMANDS if name == page and words[0] in RUN]
    assert {words[0] for words in commands} == set(RUN)
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.stderr)
        if "--out" in words:
            decode_image(Path(words[words.index("--out") + 1]).read_bytes())


def test_the_samples_are_what_their_readme_says():
    samples = ROOT / "samples"
    pair = build_scene_pair(2305, 2, 128)
    wanted = {"": pair.input.image, "-edited": pair.edited.image} | {f"-{k}": v for k, v in pair.input.maps.items()}
    for suffix, pixels in wanted.items():
        found = decode_image((samples / f"scene{suffix}.png").read_bytes())
        assert np.abs(found.astype(int) - pixels).max() <= 1, suffix  # other processors round differently
    assert decode_image((samples / "photo.jpg").read_bytes()).shape == (256, 256, 3)
    assert data.coffee().shape == (400, 600, 3)
