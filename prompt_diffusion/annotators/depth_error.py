"""How good a depth annotator is, up to the scale and shift that it cannot know (Ranftl et al., arXiv 1907.01341).

The truth is the disparity of scikit-image's stereo pair ``motorcycle`` (Middlebury 2014), the one true depth that ships with a
package of ours.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prompt_diffusion.annotators.base import Annotator, ImageBatch

Disparity = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

OUTLIER_SHARE = 0.05


@dataclass(frozen=True)  # no slots: the command line prints its vars
class DepthErrors:
    """Errors of aligned disparities, as shares of the range of the truth."""

    rmse: float
    """Root of the mean squared error."""
    mean_absolute_error: float
    """Mean of the absolute error."""
    outliers: float
    """Share of the pixels that are off by more than a twentieth of the range."""
    num_pixels: int
    """Pixels whose truth is known."""


def align_scale_and_shift(prediction: Disparity, truth: Disparity, is_known: Mask) -> tuple[float, float]:
    """Return scale and shift that bring a prediction nearest to the truth, by least squares over the known pixels.

    The scale is never negative, unlike in the paper: near is bright, and a map that has it the other way round must not
    pass. It gets 0, as a flat map does.
    """
    known, targets = prediction[is_known], truth[is_known]
    centred = known - known.mean()
    variance = float(np.square(centred).mean())
    covariance = float((centred * (targets - targets.mean())).mean())
    scale = max(covariance / variance, 0.0) if variance > 0 else 0.0
    return scale, float(targets.mean() - scale * known.mean())


def compute_depth_errors(prediction: Disparity, truth: Disparity) -> DepthErrors:
    """Return the errors of a prediction H,W against true disparities H,W, of which those that are not finite are unknown.

    ValueError where nothing is known, or the truth is constant.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth must have one shape, got {prediction.shape} and {truth.shape}")
    is_known = np.isfinite(truth)
    span = float(np.ptp(truth[is_known])) if is_known.any() else 0.0
    if span == 0.0:
        raise ValueError(f"{int(is_known.sum())} known disparities, all the same, measure nothing")
    scale, shift = align_scale_and_shift(prediction, truth, is_known)
    error = np.abs(scale * prediction + shift - truth)[is_known] / span
    return DepthErrors(
        rmse=float(np.sqrt((error**2).mean())),
        mean_absolute_error=float(error.mean()),
        outliers=float((error > OUTLIER_SHARE).mean()),
        num_pixels=int(is_known.sum()),
    )


def load_motorcycle() -> tuple[ImageBatch, Disparity]:
    """Return the left photograph H,W,3 of the stereo pair and its disparities H,W, holes as NaN."""
    from skimage import data

    left, _, disparity = data.stereo_motorcycle()
    truth = np.asarray(disparity, np.float64)
    return np.asarray(left, np.uint8), np.where(np.isfinite(truth), truth, np.nan)


def measure_motorcycle(annotator: Annotator) -> DepthErrors:
    """Return the errors of an annotator's depth map of the motorcycle."""
    image, truth = load_motorcycle()
    return compute_depth_errors(annotator.annotate(image[None])[0, ..., 0].astype(np.float64), truth)


def render_motorcycle(annotator: Annotator) -> ImageBatch:
    """Return photograph, map and truth side by side: H,3W,3; what is not known of the truth is black."""
    image, truth = load_motorcycle()
    stretched = (truth - np.nanmin(truth)) / (np.nanmax(truth) - np.nanmin(truth))
    levels = np.nan_to_num(stretched * 255.0, nan=0.0).astype(np.uint8)
    return np.hstack([image, annotator.annotate(image[None])[0], np.repeat(levels[..., None], 3, axis=2)])
