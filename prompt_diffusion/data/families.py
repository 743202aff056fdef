"""Families of picture functions: endless variants of what a scene's photograph and maps can look like, drawn from a seed.

A member of a family is a function from pixels to pixels: a palette, a colour ramp, a style of lines. Drawn once and applied
to two pictures it does the same to both. Applied to a part of a picture it gives that part of the whole (but for lines'
thickness at the part's border).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.transforms import Pixels

IMAGE, MIRRORED = "image", "image_mirrored"

Recolor = Callable[[Pixels], Pixels]
"""A member of a family: uint8 (H, W, 3) in, the same shape out."""


@dataclass(frozen=True)
class Family:
    """Variants of one kind of picture."""

    source: str
    """What its members are applied to: ``image`` or a condition."""
    draw: Callable[[np.random.Generator], Recolor]
    """Draws one member."""


def draw_ramp(generator: np.random.Generator) -> Recolor:
    """Draw a colour ramp for grey maps: a curve, in a fifth of the cases in bands, through two to five random colours."""
    values = np.linspace(0.0, 1.0, 256) ** _draw_exponent(generator, 0.9)
    if generator.random() < 0.2:
        levels = int(generator.integers(4, 13))
        values = np.floor(values * levels).clip(max=levels - 1) / (levels - 1)
    inner = generator.uniform(0.1, 0.9, size=int(generator.integers(0, 4)))
    places = np.concatenate([[0.0], np.sort(inner), [1.0]])
    return _look_up(values, places, _draw_colors(generator, len(places)))


def draw_palette(generator: np.random.Generator) -> Recolor:
    """Draw a palette for segmentations: each colour of theirs becomes a random one, in a quarter of the palettes a grey."""
    salt, is_grey = int(generator.integers(2**63)), bool(generator.random() < 0.25)

    def recolor(pixels: Pixels) -> Pixels:
        codes = encode_colors(pixels)
        found, places = np.unique(codes, return_inverse=True)
        colors = np.stack([sample_generator(salt, int(code)).integers(0, 256, 3, dtype=np.uint8) for code in found])
        if is_grey:
            colors = np.repeat(colors[:, :1], 3, axis=1)
        chosen: Pixels = colors[places.reshape(codes.shape)]
        return chosen

    return recolor


def draw_line_style(generator: np.random.Generator) -> Recolor:
    """Draw a style for edge maps: thickness, contrast, colours of ground and lines, in a quarter of the cases ink on paper."""
    width = int(generator.integers(1, 4))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    strength = np.linspace(0.0, 1.0, 256) ** _draw_exponent(generator, 0.7)
    colors = _draw_colors(generator, 2)
    if generator.random() < 0.25:
        colors = np.array([[255.0] * 3, [0.0] * 3])
    paint = _look_up(strength, np.array([0.0, 1.0]), colors)
    return lambda pixels: paint(np.asarray(cv2.dilate(np.ascontiguousarray(pixels), kernel), np.uint8))


def draw_color_map(generator: np.random.Generator) -> Recolor:
    """Draw a change of all colours of a photograph: hue turned, saturation, brightness, in a third of the cases negative."""
    angle, saturation = generator.uniform(0.0, 2.0 * math.pi), generator.uniform(0.2, 1.4)
    exponent, is_negative = _draw_exponent(generator, 0.5), bool(generator.random() < 1 / 3)
    matrix = build_hue_rotation(angle, saturation).astype(np.float32)
    tone = 255.0 * np.linspace(0.0, 1.0, 256) ** exponent
    table = (255.0 - tone if is_negative else tone).round().astype(np.uint8)

    def recolor(pixels: Pixels) -> Pixels:
        turned = pixels.astype(np.float32) @ matrix.T
        changed: Pixels = table[(turned + 0.5).clip(0.0, 255.0).astype(np.uint8)]
        return changed

    return recolor


def draw_mirror(generator: np.random.Generator) -> Recolor:
    """Return the one member of its family: left and right exchanged (for parts of a picture: each in itself)."""
    return lambda pixels: pixels[:, ::-1]


FAMILIES: dict[str, Family] = {
    "depth_ramp": Family("depth", draw_ramp),
    "seg_palette": Family("seg", draw_palette),
    "hed_style": Family("hed", draw_line_style),
    "image_recolored": Family(IMAGE, draw_color_map),
    MIRRORED: Family(IMAGE, draw_mirror),
}
"""The families, by the name of the kind of picture that they make."""


def encode_colors(pixels: Pixels) -> NDArray[np.int64]:
    """Return each colour of uint8 (..., 3) as one number (...)."""
    codes: NDArray[np.int64] = (pixels.astype(np.int64) << np.array([16, 8, 0])).sum(axis=-1)
    return codes


def build_hue_rotation(angle: float, saturation: float = 1.0) -> NDArray[np.float64]:
    """Return the matrix (3, 3) that turns RGB colours by an angle in radians about the grey diagonal (Rodrigues).

    ``saturation`` is the factor of their distance from it.
    """
    grey = np.full((3, 3), 1 / 3)
    axis = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    turn = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * axis
    matrix: NDArray[np.float64] = grey + saturation * turn
    return matrix


def find_source(kind: str) -> str:
    """Return which picture a kind is made from: the source of a family, else itself."""
    return FAMILIES[kind].source if kind in FAMILIES else kind


def vary(kind: str, pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """Return a picture of a kind from one of its source: a family's member drawn from the generator, else as it is."""
    return FAMILIES[kind].draw(generator)(pixels) if kind in FAMILIES else pixels


def show_row(kind: str, read: Callable[[str, int], Pixels], seed: int, row: int) -> Pixels:
    """Return the picture of a kind that a row gives: its source, ``read`` by kind and row, in the row's own member."""
    stream = list(FAMILIES).index(kind) if kind in FAMILIES else 0
    return vary(kind, read(find_source(kind), row), sample_generator(seed, row, stream))


def _draw_exponent(generator: np.random.Generator, spread: float) -> float:
    return math.exp(generator.uniform(-spread, spread))


def _draw_colors(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    return generator.uniform(0.0, 255.0, size=(count, 3))


def _look_up(values: NDArray[np.float64], places: NDArray[np.float64], colors: NDArray[np.float64]) -> Recolor:
    """Return what gives each grey level the colour at its value (256,) on a line through colours at places in [0, 1]."""
    table = np.stack([np.interp(values, places, colors[:, channel]) for channel in range(3)], axis=1)
    rounded = table.round().astype(np.uint8)
    return lambda pixels: rounded[pixels[..., 0]]
