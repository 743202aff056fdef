from types import SimpleNamespace

import numpy as np
import pytest

from prompt_diffusion.annotators.depth_error import (
    align_scale_and_shift,
    compute_depth_errors,
    load_motorcycle,
    measure_motorcycle,
    render_motorcycle,
)

TRUTH = np.linspace(0.0, 10.0, 40 * 50).reshape(40, 50)


def test_scale_and_shift_of_the_truth_cost_nothing() -> None:
    errors = compute_depth_errors(3.0 * TRUTH - 7.0, TRUTH)
    assert errors.rmse == pytest.approx(0.0, abs=1e-12)
    assert errors.outliers == 0.0
    assert errors.num_pixels == 2000


def test_a_known_error_by_hand() -> None:
    # Errors of +1 and -1, uncorrelated with the truth, over a range of 10: no scale or shift removes them.
    rows = np.arange(8.0)
    truth = np.repeat(np.array([[0.0], [10.0]]), 8, axis=1)
    prediction = truth + np.where(rows % 2 == 0, 1.0, -1.0)
    errors = compute_depth_errors(prediction, truth)
    # Least squares shrinks the scale to 25 / 26 of the truth's; what is left is sqrt(25 * 1 / 26) over 10.
    assert errors.rmse == pytest.approx(np.sqrt(25 / 26) / 10)
    assert errors.outliers == 1.0


def test_holes_of_the_truth_do_not_count() -> None:
    truth, prediction = TRUTH.copy(), TRUTH.copy()
    truth[:10] = np.nan
    prediction[:10] = 1e6
    errors = compute_depth_errors(prediction, truth)
    assert errors.rmse == pytest.approx(0.0, abs=1e-9)
    assert errors.num_pixels == 1500


def test_a_bent_map_is_worse_than_the_truth_and_better_than_a_flat_one() -> None:
    bent = compute_depth_errors(np.sqrt(TRUTH), TRUTH).rmse
    flat = compute_depth_errors(np.zeros_like(TRUTH), TRUTH).rmse
    assert 0.01 < bent < flat


@pytest.mark.parametrize("truth", [np.full((4, 4), np.nan), np.ones((4, 4))])
def test_a_truth_that_measures_nothing_is_refused(truth: np.ndarray) -> None:
    with pytest.raises(ValueError, match="measure nothing"):
        compute_depth_errors(np.ones((4, 4)), truth)


def test_the_motorcycles_own_disparity_scores_best_and_is_drawn() -> None:
    image, truth = load_motorcycle()
    levels = np.nan_to_num((truth - np.nanmin(truth)) / np.nanmax(truth) * 255.0)[..., None].astype(np.uint8)
    perfect = SimpleNamespace(annotate=lambda images: np.repeat(levels, 3, axis=2)[None])
    upside_down = SimpleNamespace(annotate=lambda images: perfect.annotate(images)[:, ::-1])
    assert measure_motorcycle(perfect).rmse < 0.005  # type: ignore[arg-type]
    assert measure_motorcycle(upside_down).rmse > 0.1  # type: ignore[arg-type]
    assert measure_motorcycle(perfect).num_pixels > 200_000  # type: ignore[arg-type]
    sheet = render_motorcycle(perfect)  # type: ignore[arg-type]
    assert sheet.shape == (image.shape[0], 3 * image.shape[1], 3)


def test_a_map_whose_near_is_dark_scores_as_a_flat_one() -> None:
    inverted, flat = compute_depth_errors(-TRUTH, TRUTH), compute_depth_errors(np.ones_like(TRUTH), TRUTH)
    assert inverted.rmse == pytest.approx(flat.rmse) == pytest.approx(TRUTH.std() / 10)


def test_scale_and_shift_are_numpys_least_squares() -> None:
    rng = np.random.default_rng(0)
    prediction, is_known = rng.random((9, 7)), rng.random((9, 7)) < 0.7
    truth = 3 * prediction + 2 + 0.5 * rng.standard_normal((9, 7))
    design = np.stack([prediction[is_known], np.ones(is_known.sum())], axis=1)
    expected = np.linalg.lstsq(design, truth[is_known], rcond=None)[0]
    assert align_scale_and_shift(prediction, truth, is_known) == pytest.approx(tuple(expected))


def test_the_command_line_can_print_the_errors() -> None:
    assert vars(compute_depth_errors(TRUTH, TRUTH))["num_pixels"] == 2000
