"""Affine colour maps, fitted by least squares: what a change of colours alone can explain, or can answer."""

import numpy as np
import numpy.typing as npt

from prompt_diffusion.evaluation.rmse import ImageArray

Coefficients = npt.NDArray[np.float64]
"""(4, 3): what each of red, green, blue and 1 adds to each channel, in grey levels."""


def fit_color_map(source: ImageArray, target: ImageArray) -> Coefficients:
    """Return the affine colour map of least squared error from one image's pixels to another's, uint8 (h, w, 3) both.

    Of several that are equally good, as for an image of one colour, the one of smallest norm. ValueError for other shapes.
    """
    if source.shape != target.shape or source.shape[-1:] != (3,):
        raise ValueError(
            f"a colour map is fitted to images of one shape (h, w, 3), not {source.shape} and {target.shape}"
        )
    fitted = np.linalg.lstsq(_with_one(source), target.reshape(-1, 3).astype(np.float64), rcond=None)[0]
    return fitted.astype(np.float64)


def apply_color_map(coefficients: Coefficients, image: ImageArray) -> ImageArray:
    """Return an image (h, w, 3) in the fitted map's colours, rounded and clipped to uint8."""
    values = _with_one(image) @ coefficients
    mapped: ImageArray = (values + 0.5).clip(0.0, 255.0).astype(np.uint8).reshape(image.shape)
    return mapped


def compute_fitted_rmse(images: ImageArray, truths: ImageArray) -> float:
    """Return the RMSE, RGB in [0, 1], that is left after the best affine colour map of each image (n, h, w, 3) to its truth.

    It says how good an answer's shapes are when its colours do not count; it is never larger than the plain RMSE.
    """
    errors = []
    for image, truth in zip(images, truths, strict=True):
        residual = _with_one(image) @ fit_color_map(image, truth) - truth.reshape(-1, 3)
        errors.append(np.square(residual / 255.0).mean())
    return float(np.sqrt(np.mean(errors)))


def _with_one(image: ImageArray) -> npt.NDArray[np.float64]:
    pixels = image.reshape(-1, 3).astype(np.float64)
    return np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
