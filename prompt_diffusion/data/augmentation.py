"""Vision-task augmentation: random target functions beside the vision tasks, so that a model must read the example pair.

A family draws functions with continuous parameters; a sample's function is a function of (seed, index) and is applied to its
example and to its query. A vision task's direction decides on which side of the pairs the function's picture stands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from prompt_diffusion.data.families import (
    IMAGE,
    draw_color_map,
    draw_line_style,
    draw_palette,
    draw_ramp,
)
from prompt_diffusion.data.held_out import resembles_held_out
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.target_functions import (
    Mask,
    TargetFunction,
    apply_to,
    build_affine_map,
    build_warp,
    choose_by_region,
    group_classes,
    is_nearer_than,
)
from prompt_diffusion.data.transforms import Pixels

_STREAM = 4  # sample_generator's streams 0 to 3 draw samples and their order


@dataclass(frozen=True)
class AugmentationFamily:
    """Target functions of one kind."""

    sources: tuple[str, ...]
    """The pictures that its functions read: ``image`` or conditions."""
    draw: Callable[[np.random.Generator], TargetFunction]
    """Draws one function."""

    @property
    def conditions(self) -> frozenset[str]:
        """The conditions whose maps its functions read."""
        return frozenset(self.sources) - {IMAGE}


def draw_classes(generator: np.random.Generator) -> TargetFunction:
    """Draw a palette for segmentations; in a sixth of the cases classes are merged first, at random, into two to four."""
    palette = draw_palette(generator)
    if generator.random() >= 1 / 6:
        return apply_to("seg", palette)
    salt, num_groups = int(generator.integers(2**63)), int(generator.integers(2, 5))

    def merge(pixels: Pixels) -> Pixels:
        groups = group_classes(pixels, salt, num_groups)
        return palette(np.repeat(groups[..., None], 3, axis=2).astype(np.uint8))

    return apply_to("seg", merge)


def draw_depth(generator: np.random.Generator) -> TargetFunction:
    """Draw a ramp of colours for depth maps; a fifth are grey, near brighter than far, between two levels and on a curve."""
    if generator.random() >= 1 / 5:
        return apply_to("depth", draw_ramp(generator))
    far, near, exponent = generator.uniform(0, 100), generator.uniform(150, 255), np.exp(generator.uniform(-0.9, 0.9))
    levels = (far + (near - far) * np.linspace(0.0, 1.0, 256) ** exponent).round().astype(np.uint8)
    return apply_to("depth", lambda pixels: levels[pixels])


def draw_edges(generator: np.random.Generator) -> TargetFunction:
    """Draw a style for edge maps: thickness, contrast and two colours."""
    return apply_to("hed", draw_line_style(generator))


def draw_colors(generator: np.random.Generator) -> TargetFunction:
    """Draw a colour map for photographs: hue, saturation and brightness changed, or channels exchanged, scaled, negative."""
    if generator.random() < 0.5:
        return apply_to(IMAGE, draw_color_map(generator))
    gains = generator.uniform(0.6, 1.0, 3)
    offsets = generator.uniform(0.0, 1.0, 3) * (1.0 - gains)
    is_negative = generator.random(3) < 0.35
    signs, offsets = np.where(is_negative, -gains, gains), np.where(is_negative, offsets + gains, offsets)
    return apply_to(IMAGE, build_affine_map(np.diag(signs)[:, generator.permutation(3)], offsets))


def draw_mixture(generator: np.random.Generator) -> TargetFunction:
    """Draw what shows one map in some regions and another elsewhere: regions by class or by depth, never a photograph."""
    inside = (draw_classes, draw_depth, draw_edges)[int(generator.integers(3))](generator)
    outside = (draw_classes, draw_depth)[int(generator.integers(2))](generator)
    return choose_by_region(_draw_region(generator), inside, outside)


def draw_warp(generator: np.random.Generator) -> TargetFunction:
    """Draw what moves the photograph: turned, enlarged or reduced, shifted, half of the times mirrored."""
    angle, zoom = generator.uniform(-np.pi, np.pi), np.exp(generator.uniform(-0.4, 0.4))
    across, down = generator.uniform(-0.2, 0.2, 2).tolist()
    return apply_to(IMAGE, build_warp(angle, zoom, (across, down), is_mirrored=bool(generator.random() < 0.5)))


AUGMENTATIONS: Final[dict[str, AugmentationFamily]] = {
    "classes": AugmentationFamily(("seg",), draw_classes),
    "depth_colors": AugmentationFamily(("depth",), draw_depth),
    "edge_colors": AugmentationFamily(("hed",), draw_edges),
    "photo_colors": AugmentationFamily((IMAGE,), draw_colors),
    "region_mixture": AugmentationFamily(("depth", "hed", "seg"), draw_mixture),
    "geometry": AugmentationFamily((IMAGE,), draw_warp),
}
"""The families that a training can draw from, by name."""


def find_augmentation(family: str) -> AugmentationFamily:
    """Return a family; ValueError lists those that there are."""
    if family not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {family!r}: choose from {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[family]


@dataclass(frozen=True)
class Augmentation:
    """The target function of one sample."""

    family: str
    """The family that drew it."""
    function: TargetFunction
    """The same for the sample's example and query."""

    def make(self, read: Callable[[str | None], Pixels]) -> Pixels:
        """Return the function's picture of a scene, uint8 (H, W, 3); ``read`` gives a condition's map, None: the photograph."""
        sources = find_augmentation(self.family).sources
        pictures = {source: read(None if source == IMAGE else source) for source in sources}
        return np.ascontiguousarray(self.function(pictures))


def draw_augmentation(shares: Mapping[str, float], seed: int, index: int) -> Augmentation | None:
    """Return the augmentation of a sample, None for one that shows its vision task: a function of (seed, index).

    ``shares``: by family, at most 1 together. Its function is never one of a held-out family.
    """
    if not shares:
        return None
    generator = sample_generator(seed, index, _STREAM)
    position = float(generator.random()) - np.cumsum(list(shares.values()))
    if position[-1] >= 0.0:
        return None
    family = list(shares)[int(np.argmax(position < 0.0))]
    return Augmentation(family, draw_target_function(family, generator))


def draw_target_function(family: str, generator: np.random.Generator) -> TargetFunction:
    """Draw a function of a family that is not one of a held-out family, nor near it."""
    while True:
        function = find_augmentation(family).draw(generator)
        if not resembles_held_out(function):
            return function


def _draw_region(generator: np.random.Generator) -> Mask:
    if generator.random() < 0.3:
        return is_nearer_than(generator.uniform(40.0, 200.0))
    salt = int(generator.integers(2**63))
    return lambda pictures: group_classes(pictures["seg"], salt, 2) == 1
