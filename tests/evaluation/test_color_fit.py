import numpy as np
import pytest

from prompt_diffusion.data.held_out import HELD_OUT
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.evaluation.color_fit import apply_color_map, compute_fitted_rmse, fit_color_map
from prompt_diffusion.evaluation.rmse import compute_rmse


@pytest.fixture(scope="module")
def photographs() -> tuple[np.ndarray, np.ndarray]:
    return tuple(build_scene_pair(5, group, 32).edited.image for group in (3, 6))  # type: ignore[return-value]


def test_a_color_map_fitted_on_a_pair_is_exact_for_an_affine_recoloring(photographs: tuple[np.ndarray, ...]) -> None:
    example, query = photographs
    generator = np.random.default_rng(0)
    for _ in range(5):
        matrix, offset = (
            generator.dirichlet(np.ones(4), 3)[:, :3] * 0.9,
            generator.uniform(5, 20, 3),
        )  # no pixel is clipped
        source_of = {"example": example, "query": query}
        target = {name: (image @ matrix.T + offset + 0.5).astype(np.uint8) for name, image in source_of.items()}
        answer = apply_color_map(fit_color_map(example, target["example"]), query)
        assert np.abs(answer.astype(int) - target["query"]).max() <= 1


def test_it_is_exact_for_the_negative_and_not_for_a_palette(photographs: tuple[np.ndarray, ...]) -> None:
    example, query = photographs
    negative = HELD_OUT["negative"].member(0)
    fitted = fit_color_map(example, negative({"image": example}))
    np.testing.assert_array_equal(apply_color_map(fitted, query), negative({"image": query}))


def test_what_colors_explain_is_no_error_after_the_fit_and_shapes_are(photographs: tuple[np.ndarray, ...]) -> None:
    truths = np.stack(photographs)
    assert compute_fitted_rmse(255 - truths, truths) == pytest.approx(0.0, abs=1e-9)
    assert compute_rmse(255 - truths, truths) > 0.2
    moved = np.roll(truths, 8, axis=2)
    assert 0.05 < compute_fitted_rmse(moved, truths) <= compute_rmse(moved, truths)


def test_an_answer_of_one_color_is_fitted_by_the_truths_mean(photographs: tuple[np.ndarray, ...]) -> None:
    truth = photographs[0]
    spread = np.sqrt(np.square((truth - truth.mean(axis=(0, 1))) / 255.0).mean())
    assert compute_fitted_rmse(np.full_like(truth, 7)[None], truth[None]) == pytest.approx(spread)


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not \(4, 4, 3\) and \(4, 5, 3\)"):
        fit_color_map(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8))
