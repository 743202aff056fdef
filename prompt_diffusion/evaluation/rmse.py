"""The error of image-to-map vision tasks, as published: RMSE over RGB in [0, 1]."""

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.uint8]


def compute_image_errors(images: ImageArray, truths: ImageArray) -> npt.NDArray[np.float64]:
    """Return the mean squared error of each image (n,), over all pixels and channels, RGB scaled to [0, 1].

    Both arrays are uint8 of one shape (n, h, w, 3); ValueError otherwise.
    """
    if images.shape != truths.shape or images.ndim != 4 or not len(images):
        raise ValueError(f"images and truths must have one shape (n, h, w, 3), not {images.shape} and {truths.shape}")
    if images.dtype != np.uint8 or truths.dtype != np.uint8:
        raise ValueError(f"images and truths must be uint8, not {images.dtype} and {truths.dtype}")
    # One image at a time: the whole set in float64 would be eight times its size.
    return np.array([_mean_square(image, truth) for image, truth in zip(images, truths, strict=True)])


def compute_rmse(images: ImageArray, truths: ImageArray) -> float:
    """Return sqrt(mean over images of the per-image mean squared error): the paper's RMSE, 0 (equal) to 1."""
    return float(np.sqrt(compute_image_errors(images, truths).mean()))


def _mean_square(image: ImageArray, truth: ImageArray) -> float:
    return float(np.square((image.astype(np.float64) - truth.astype(np.float64)) / 255.0).mean())
