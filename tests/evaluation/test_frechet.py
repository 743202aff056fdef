import numpy as np
import pytest
from cleanfid.fid import frechet_distance as compute_peer_distance
from scipy import linalg

from prompt_diffusion.evaluation.frechet import (
    Gaussian,
    compute_frechet_distance,
    compute_gaussian,
    compute_gaussian_distance,
)


def draw_features(seed: int, n: int, d: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / np.sqrt(d) + shift


@pytest.mark.parametrize(("n", "d"), [(200, 12), (20, 64)])
def test_distance_of_equal_sets_is_zero(n: int, d: int) -> None:
    features = draw_features(0, n, d)
    assert compute_frechet_distance(features, features.copy()) == pytest.approx(0.0, abs=1e-6)


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a = Gaussian(np.array([1.0, -2.0, 0.5]), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([0.0, 1.0, 0.5]), np.diag([4.0, 1.0, 9.0]))
    closed_form = (1.0 + 9.0 + 0.0) + (1.0 - 2.0) ** 2 + (2.0 - 1.0) ** 2 + 0.0
    assert compute_gaussian_distance(a, b) == pytest.approx(closed_form, rel=1e-12)


def test_distance_of_shifted_sets_is_the_square_of_the_shift() -> None:
    features = draw_features(1, 300, 8)
    assert compute_frechet_distance(features, features + 0.5) == pytest.approx(8 * 0.25, rel=1e-9)


@pytest.mark.parametrize(("n_a", "n_b", "d"), [(400, 350, 16), (25, 31, 48), (60, 20, 40)])
def test_distance_is_clean_fids(n_a: int, n_b: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # SciPy 1.18 drops the argument that clean-fid calls `sqrtm` with, and returns the root alone.
    sqrtm = linalg.sqrtm
    monkeypatch.setattr(linalg, "sqrtm", lambda matrix, disp=True: sqrtm(matrix) if disp else (sqrtm(matrix), 0.0))
    a, b = draw_features(2, n_a, d), draw_features(3, n_b, d, shift=0.3)
    gaussian_a, gaussian_b = compute_gaussian(a), compute_gaussian(b)
    peer = compute_peer_distance(*gaussian_a, *gaussian_b)
    assert compute_frechet_distance(a, b) == pytest.approx(peer, rel=1e-4)
    if min(n_a, n_b) > d:
        assert compute_frechet_distance(a, b) == pytest.approx(peer, rel=1e-9)


def test_few_rows_give_the_value_of_the_full_covariances() -> None:
    a, b = draw_features(4, 30, 50), draw_features(5, 24, 50, shift=0.2)
    full = compute_gaussian_distance(compute_gaussian(a), compute_gaussian(b))
    assert compute_frechet_distance(a, b) == pytest.approx(full, rel=1e-5)


def test_gaussian_is_numpys_mean_and_covariance() -> None:
    features = draw_features(6, 40, 5)
    mean, covariance = compute_gaussian(features)
    np.testing.assert_allclose(mean, features.mean(axis=0))
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False))


def test_fewer_than_two_rows_are_refused() -> None:
    one = np.zeros((1, 4))
    with pytest.raises(ValueError, match=r"n of at least 2, not \(1, 4\)"):
        compute_gaussian(one)
    with pytest.raises(ValueError, match="at least 2"):
        compute_frechet_distance(draw_features(0, 3, 4), one)


def test_features_of_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        compute_frechet_distance(np.zeros((3, 4)), np.zeros((3, 5)))
