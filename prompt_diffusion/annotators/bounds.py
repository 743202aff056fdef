"""How large an image an annotator sees: what is larger is shrunk before, and its map enlarged again.

A network's memory grows with the pixels (HED's by 0.6 kB a pixel), and a file of eight kilobytes may hold 64 megapixels.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from prompt_diffusion.annotators.base import MEGAPIXEL, Annotator, ImageBatch

logger = logging.getLogger(__name__)


def fit_shape(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Return the largest height and width of that aspect within so many pixels; the same where it fits already."""
    if height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    return max(1, min(int(height * scale), max_pixels)), max(1, min(int(width * scale), max_pixels))


def say_limit(name: str, height: int, width: int, max_pixels: int) -> str | None:
    """Return the sentence for whoever gave an image that is larger than an annotator sees; None for any other."""
    shown = fit_shape(height, width, max_pixels)
    if shown == (height, width):
        return None
    return (
        f"{name} sees up to {max_pixels / MEGAPIXEL:g} megapixels: an image of {width} x {height} was annotated at "
        f"{shown[1]} x {shown[0]}, and its map enlarged"
    )


@dataclass(frozen=True, slots=True)
class BoundedAnnotator:
    """An annotator that is shown no more pixels than it has memory for."""

    annotator: Annotator
    max_pixels: int
    has_classes: bool
    """Whether the map's values are classes or strokes, which must not be mixed when it is enlarged."""

    @property
    def name(self) -> str:
        """The annotator's own."""
        return self.annotator.name

    @property
    def version(self) -> int:
        """The annotator's own."""
        return self.annotator.version

    @property
    def weights_digest(self) -> str:
        """The annotator's own."""
        return self.annotator.weights_digest

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Return the maps, of the images' own size; a warning says where they were made of smaller ones."""
        if images.ndim != 4 or images.shape[1] * images.shape[2] <= self.max_pixels:
            return self.annotator.annotate(images)
        self.warn(images.shape[1], images.shape[2])
        maps = self.annotator.annotate(np.stack([self.shrink(image) for image in images]))
        return np.stack([self.enlarge(map_, images.shape[1], images.shape[2]) for map_ in maps])

    def warn(self, height: int, width: int) -> None:
        """Log that an image of that size is larger than what is seen, where it is."""
        sentence = say_limit(self.name, height, width, self.max_pixels)
        if sentence is not None:
            _warn_once(sentence)

    def shrink(self, image: ImageBatch) -> ImageBatch:
        """Return an image H,W,3 as the annotator sees it, resized by Lanczos where it is too large."""
        height, width = fit_shape(image.shape[0], image.shape[1], self.max_pixels)
        return _resize(image, height, width, Image.Resampling.LANCZOS)

    def enlarge(self, map_: ImageBatch, height: int, width: int) -> ImageBatch:
        """Return a map of a shrunk image at the image's own size: bilinearly, or where it has classes, the nearest."""
        way = Image.Resampling.NEAREST if self.has_classes else Image.Resampling.BILINEAR
        return _resize(map_, height, width, way)


@lru_cache(maxsize=256)
def _warn_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def _resize(image: ImageBatch, height: int, width: int, way: Image.Resampling) -> ImageBatch:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), way), np.uint8)
