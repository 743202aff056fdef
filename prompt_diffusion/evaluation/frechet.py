"""The Frechet distance between two sets of image features.

Letters: m and C are the mean and covariance of a set's features (n rows, d columns), and

    distance = |m_a - m_b|^2 + Tr(C_a) + Tr(C_b) - 2 Tr((C_a C_b)^(1/2))

Source: Heusel et al., arXiv 1706.08500, equation 6 (there with Inception features, and called FID). Which features
these are is not this module's business: whoever prints the number must name the extractor.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import linalg

FloatArray = npt.NDArray[np.float64]


class Gaussian(NamedTuple):
    """The Gaussian fitted to a set of features."""

    mean: FloatArray
    """Shape (d,)."""
    covariance: FloatArray
    """Shape (d, d), unbiased (divided by n - 1)."""


def compute_gaussian(features: FloatArray) -> Gaussian:
    """Return mean and unbiased covariance of features (n, d); ValueError where n < 2."""
    centred, mean = _centre(features)
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def compute_gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Frechet distance of two Gaussians of the same dimension d.

    Tr((C_a C_b)^(1/2)) is the sum of the square roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric: two symmetric eigenvalue problems, where a general matrix square root is slower and leaves SciPy's API
    in 1.18.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.size} and of {b.mean.size} dimensions have no Frechet distance")
    eigenvalues, eigenvectors = linalg.eigh(a.covariance)
    root = eigenvectors * np.sqrt(np.clip(eigenvalues, 0.0, None)) @ eigenvectors.T
    product = linalg.eigvalsh(root @ b.covariance @ root)
    trace_of_root = float(np.sqrt(np.clip(product, 0.0, None)).sum())
    return _combine(a.mean - b.mean, float(np.trace(a.covariance)), float(np.trace(b.covariance)), trace_of_root)


def compute_frechet_distance(features_a: FloatArray, features_b: FloatArray) -> float:
    """Return the Frechet distance between two sets of features (n_a, d) and (n_b, d); ValueError where an n < 2.

    With fewer rows than dimensions the covariances are X^T X of the centred, scaled features X, and
    Tr((C_a C_b)^(1/2)) is the sum of the singular values of X_a X_b^T: an n by n problem instead of two d by d ones,
    and free of the rounding noise that the square roots of zero eigenvalues bring.
    """
    if features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"features of shapes {features_a.shape} and {features_b.shape} have no Frechet distance")
    if max(len(features_a), len(features_b)) >= features_a.shape[1]:
        return compute_gaussian_distance(compute_gaussian(features_a), compute_gaussian(features_b))
    (centred_a, mean_a), (centred_b, mean_b) = _centre(features_a), _centre(features_b)
    scaled_a = centred_a / np.sqrt(len(features_a) - 1)
    scaled_b = centred_b / np.sqrt(len(features_b) - 1)
    trace_of_root = float(linalg.svdvals(scaled_a @ scaled_b.T).sum())
    return _combine(mean_a - mean_b, float(np.square(scaled_a).sum()), float(np.square(scaled_b).sum()), trace_of_root)


def _centre(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs features of shape (n, d) with n of at least 2, not {features.shape}")
    mean = features.mean(axis=0, dtype=np.float64)
    return features - mean, mean


def _combine(difference: FloatArray, trace_a: float, trace_b: float, trace_of_root: float) -> float:
    # Rounding can leave equal sets at minus a few ulps; a squared distance is not negative.
    return max(0.0, float(difference @ difference) + trace_a + trace_b - 2.0 * trace_of_root)
