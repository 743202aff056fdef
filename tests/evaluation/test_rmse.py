import numpy as np
import pytest

from prompt_diffusion.evaluation.rmse import compute_image_errors, compute_rmse


def test_rmse_is_the_root_of_the_mean_of_the_images_errors() -> None:
    truths = np.zeros((2, 4, 4, 3), np.uint8)
    images = truths.copy()
    images[0] = 51  # 0.2 off everywhere
    images[1, :2] = 255  # 1.0 off in one half
    np.testing.assert_allclose(compute_image_errors(images, truths), [0.04, 0.5])
    assert compute_rmse(images, truths) == pytest.approx(np.sqrt(0.27))


def test_rmse_does_not_wrap_around() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert compute_rmse(black, white) == compute_rmse(white, black) == 1.0


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 4, 4, 3), (2, 4, 5, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        compute_rmse(np.zeros(shape, np.uint8), np.zeros((2, 4, 4, 3), np.uint8))


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        compute_rmse(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 2, 3)))  # type: ignore[arg-type]
