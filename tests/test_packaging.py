"""The wheel as its users have it: built, installed outside the checkout, and its command run."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import prompt_diffusion

ROOT = Path(prompt_diffusion.__file__).parents[1]
NOT_HERE = "this command runs the flows of the repository, which an installed package does not bring"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into an environment that borrows every other package of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # a .pth file adds the folder alone: that folder's own .pth, by which this checkout is installed, is not read
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a user's folder whose own modules are called as ours and as the standard library's."""
    for name in ("flows", "tasks", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the module of the current folder was imported')\n")
    return tmp_path


def run(bin_folder: Path, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(bin_folder / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=home, env=environment | variables, capture_output=True, text=True)


def test_the_wheel_holds_our_package_and_no_other_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "prompt_diffusion",
        f"prompt_diffusion-{prompt_diffusion.__version__}.dist-info",
    }
    for needed in (
        "py.typed",
        "evaluation/report.html.jinja",
        "registry/card.md.jinja",
        "model/demo_base/unet/diffusion_pytorch_model.safetensors",
    ):
        assert f"prompt_diffusion/{needed}" in names


def test_the_installed_package_and_its_commands_work_outside_the_checkout(bin_folder: Path, home: Path) -> None:
    code = "import prompt_diffusion as p; print(p.__version__, p.__file__)"
    version, file = run(bin_folder, home, "python", "-P", "-c", code).stdout.split()
    assert version == prompt_diffusion.__version__
    assert Path(file).is_relative_to(bin_folder.parent)
    for arguments in (["--help"], ["generate", "--help"], ["annotators", "list"]):
        result = run(bin_folder, home, "prompt-diffusion", *arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout


@pytest.mark.parametrize("arguments", [["demo", "--preset", "smoke"], ["train"], ["train", "--dry-run"]], ids=" ".join)
def test_what_needs_the_repository_says_so_in_one_sentence(bin_folder: Path, home: Path, arguments: list[str]) -> None:
    result = run(bin_folder, home, "prompt-diffusion", *arguments)
    assert result.returncode == 2
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"prompt-diffusion: {NOT_HERE}: git clone the repository and run `make demo` there once")


def test_somebody_elses_package_called_flows_is_named(bin_folder: Path, home: Path) -> None:
    other = home / "elsewhere" / "flows.py"
    other.parent.mkdir()
    other.write_text("")
    result = run(bin_folder, home, "prompt-diffusion", "demo", PYTHONPATH=str(other.parent))
    assert result.returncode == 2
    assert f"{NOT_HERE} ({other} is another 'flows'): git clone" in result.stderr
