import pytest

from prompt_diffusion.generation import open_model
from prompt_diffusion.settings import Settings


@pytest.fixture(scope="module")
def model(tiny_pipeline):
    return open_model(tiny_pipeline, Settings(), "cpu")


@pytest.fixture(scope="module")
def files(scene_files):
    return {name: path.read_bytes() for name, path in scene_files.items()}
