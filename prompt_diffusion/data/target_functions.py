"""Target functions: what an example pair can ask for, as functions from a scene's pictures to one picture.

A function is applied to the pictures of the example and to those of the query, and so means the same on both sides. Most are
pointwise: what they do to a pixel depends on that pixel's values alone. Spatial ones give sizes as shares of the picture's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.families import IMAGE, Recolor, encode_colors
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.transforms import Pixels

Pictures = Mapping[str, Pixels]
"""The photograph (``image``) and condition maps of one scene by condition, uint8 (H, W, 3) of one size."""
TargetFunction = Callable[[Pictures], Pixels]
"""What an example pair asks for: uint8 (H, W, 3) from pictures of that size."""
Mask = Callable[[Pictures], NDArray[np.bool_]]
"""Which pixels of a picture are meant, bool (H, W)."""


def apply_to(source: str, recolor: Recolor) -> TargetFunction:
    """Return the function that changes one picture of a scene, ``image`` or a condition's map."""
    return lambda pictures: recolor(pictures[source])


def choose_by_region(mask: Mask, inside: TargetFunction, outside: TargetFunction) -> TargetFunction:
    """Return the function that shows one picture where the mask says so and another elsewhere."""

    def mix(pictures: Pictures) -> Pixels:
        mixed: Pixels = np.where(mask(pictures)[..., None], inside(pictures), outside(pictures))
        return mixed

    return mix


def has_any_color(colors: Pixels) -> Mask:
    """Return the mask of the segmentation's pixels that have one of the colours (N, 3)."""
    wanted = encode_colors(colors)
    return lambda pictures: np.isin(encode_colors(pictures["seg"]), wanted)


def is_nearer_than(level: float) -> Mask:
    """Return the mask of the pixels whose depth map is brighter than a grey level: those nearer than a plane."""
    return lambda pictures: pictures["depth"][..., 0] > level


def group_classes(pixels: Pixels, salt: int, num_groups: int) -> NDArray[np.int64]:
    """Return the group (H, W), below ``num_groups``, of each pixel of a segmentation: a function of its colour and a salt."""
    codes = encode_colors(pixels)
    found, places = np.unique(codes, return_inverse=True)
    groups = np.array([sample_generator(salt, int(code)).integers(num_groups) for code in found])
    chosen: NDArray[np.int64] = groups[places.reshape(codes.shape)]
    return chosen


def build_affine_map(matrix: NDArray[np.floating[Any]], offset: NDArray[np.floating[Any]]) -> Recolor:
    """Return the colour map x -> matrix x + offset of RGB in [0, 1], rounded and clipped; (3, 3) and (3,)."""
    weights, shift = matrix.T.astype(np.float32), 255.0 * offset.astype(np.float32)
    return lambda pixels: _to_bytes(pixels.astype(np.float32) @ weights + shift)


def build_line_painter(ground: Pixels, ink: Pixels) -> Recolor:
    """Return what paints a grey edge map: the ground's colour (3,) where it is black, the ink's where it is white."""
    levels = np.arange(256)[:, None] / 255.0
    table = _to_bytes(ground * (1.0 - levels) + ink * levels)
    return lambda pixels: table[pixels[..., 0]]


def build_warp(angle: float, zoom: float, shift: tuple[float, float], *, is_mirrored: bool = False) -> Recolor:
    """Return a similarity about the middle: turned by radians, enlarged, moved right and down by shares of the size.

    Linear interpolation; beyond its border a picture is reflected. A mirrored one is mirrored first, left to right.
    """

    def warp(pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        middle = ((width - 1) / 2.0, (height - 1) / 2.0)
        matrix = cv2.getRotationMatrix2D(middle, float(np.degrees(angle)), zoom)
        matrix[:, 2] += np.array(shift) * (width, height)
        shown = np.ascontiguousarray(pixels[:, ::-1] if is_mirrored else pixels)
        return np.asarray(cv2.warpAffine(shown, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101), np.uint8)

    return warp


def find_canny(pixels: Pixels) -> Pixels:
    """Return OpenCV's Canny edges, 255 on 0, of a photograph at the published thresholds (100, 200)."""
    return _to_rgb(np.asarray(cv2.Canny(np.ascontiguousarray(pixels), 100, 200), np.uint8))


def sketch_by_gaussians(pixels: Pixels) -> Pixels:
    """Return a drawing in dark lines on white: extended difference of Gaussians, soft threshold.

    Source: Winnemoeller et al., XDoG, Computers & Graphics 36 (2012), equations 7 and 5: p 20, phi 10, epsilon 0.6; sigma is
    1/160 of the width.
    """
    grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
    sigma, strength = max(pixels.shape[1] / 160.0, 0.4), 20.0
    narrow, wide = (cv2.GaussianBlur(grey, (0, 0), factor * sigma) for factor in (1.0, 1.6))
    sharpened = (1.0 + strength) * narrow - strength * wide
    return _to_rgb(_to_bytes(255.0 * np.where(sharpened >= 0.6, 1.0, 1.0 + np.tanh(10.0 * (sharpened - 0.6)))))


def stylize(pixels: Pixels) -> Pixels:
    """Return OpenCV's ``stylization``: flat areas and dark outlines, its filter as wide as a tenth of the picture."""
    return np.asarray(
        cv2.stylization(np.ascontiguousarray(pixels), sigma_s=pixels.shape[1] / 10, sigma_r=0.45), np.uint8
    )


def sketch_by_pencil(pixels: Pixels) -> Pixels:
    """Return OpenCV's ``pencilSketch`` in grey, its filter as wide as a tenth of the picture."""
    size = pixels.shape[1] / 10
    grey, _ = cv2.pencilSketch(np.ascontiguousarray(pixels), sigma_s=size, sigma_r=0.1, shade_factor=0.04)
    return _to_rgb(np.asarray(grey, np.uint8))


def show_image(pictures: Pictures) -> Pixels:
    """Return the photograph as it is."""
    return pictures[IMAGE]


def _to_bytes(values: NDArray[np.floating[Any]]) -> Pixels:
    clipped: Pixels = (values + 0.5).clip(0.0, 255.0).astype(np.uint8)
    return clipped


def _to_rgb(grey: Pixels) -> Pixels:
    """Return grey (H, W) as (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)
