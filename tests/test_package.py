"""What ``import prompt_diffusion`` offers, and that it costs nothing until it is used."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import prompt_diffusion


def test_every_name_that_the_package_shows_is_there() -> None:
    shown = dir(prompt_diffusion)
    assert {"PromptDiffusionPipeline", "load", "__version__"} <= set(shown)
    assert shown == sorted([*prompt_diffusion.__all__, "__version__"])
    for name in shown:
        thing = getattr(prompt_diffusion, name)
        assert name == "__version__" or thing.__name__ == name
    with pytest.raises(AttributeError, match="module 'prompt_diffusion' has no attribute 'lode'"):
        _ = prompt_diffusion.lode


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert prompt_diffusion.__version__ == version("prompt-diffusion")


def test_the_citation_names_the_version() -> None:
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text()
    assert f"\nversion: {prompt_diffusion.__version__}\n" in citation


def test_importing_and_listing_the_package_loads_none_of_it() -> None:
    code = (
        "import sys, json; before = set(sys.modules); import prompt_diffusion as p; dir(p); p.__version__; "
        "print(json.dumps([n for n in set(sys.modules) - before if n.partition('.')[0] not in sys.stdlib_module_names]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == ["prompt_diffusion"]
