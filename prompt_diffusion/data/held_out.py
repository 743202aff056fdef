"""Held-out families: target functions that no training draws, fixed, for measuring what a model never saw.

Three tiers. ``new_draw``: a kind of function that trainings draw, but never one of these. ``composition``: what trainings
know, combined as they never combine it. ``unseen``: no training draws anything of the kind.

That none is drawn is no matter of luck: an augmentation's draw is compared, on fixed scenes, with every member of every family
here, and drawn again where it is within the family's margin (``resembles_held_out``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.families import IMAGE, build_hue_rotation, draw_palette
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.sources.scene_renderer import PALETTE
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.data.target_functions import (
    Pictures,
    TargetFunction,
    apply_to,
    build_affine_map,
    build_line_painter,
    build_warp,
    choose_by_region,
    find_canny,
    has_any_color,
    show_image,
    sketch_by_gaussians,
    sketch_by_pencil,
    stylize,
)
from prompt_diffusion.data.transforms import Pixels

Floats = NDArray[np.float32]
Tier = Literal["new_draw", "composition", "unseen"]

NUM_MEMBERS: Final = 96
"""Members of a family that has many: query n is asked for member n, and after the last for the first again."""
BACKGROUND: Final[Pixels] = PALETTE[:2]
"""The scenes' classes that are no objects, sky and floor, in the colours of their segmentation."""
OBJECTS: Final[Pixels] = PALETTE[2:]
"""The scenes' classes of objects."""
_SEED = 1_923_651_115  # of members, and of the world of the probe; no training or test uses it
_PROBE_GROUPS, _PROBE_SIZE = (0, 3), 24
_APART = 80.0  # the smallest distance of two classes' colours in a palette


@dataclass(frozen=True)
class HeldOutFamily:
    """Target functions that no training draws."""

    tier: Tier
    """How it relates to what trainings draw."""
    sources: tuple[str, ...]
    """The pictures that its members read: ``image`` or conditions."""
    build: Callable[[int], TargetFunction]
    """Builds a member by its number."""
    num_members: int = 1
    """How many members there are."""
    margin: float = 0.05
    """The RMSE, RGB in [0, 1], on fixed scenes within which a draw counts as a member of this family."""
    condition: str | None = None
    """The condition map that it is: to a model of a vision task of that condition it is not held out."""

    def member(self, number: int) -> TargetFunction:
        """Return a member; numbers beyond the last begin anew."""
        return self.build(number % self.num_members)


def _generator(number: int, stream: int) -> np.random.Generator:
    return sample_generator(_SEED, number, stream)


def _build_palette(number: int) -> TargetFunction:
    """Return a palette in which any two of the scenes' classes differ clearly, so that each pixel's class can be told."""
    generator = _generator(number, 0)
    while True:
        palette = draw_palette(generator)
        colors = palette(PALETTE[None])[0].astype(np.float64)
        distances = np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1e9 * np.eye(len(colors))
        if distances.min() >= _APART:
            return apply_to("seg", palette)


def _build_ramp(number: int) -> TargetFunction:
    """Return a straight ramp between two colours that differ clearly."""
    generator = _generator(number, 1)
    while True:
        ends = generator.uniform(0.0, 255.0, (2, 3))
        if np.linalg.norm(ends[0] - ends[1]) >= 150.0 and np.ptp(ends, axis=1).max() > 40.0:
            return apply_to("depth", build_line_painter(*ends.astype(np.uint8)))


def _build_hue_rotation(number: int) -> TargetFunction:
    angle = _generator(number, 2).uniform(1.5, 4.7)
    return apply_to(IMAGE, build_affine_map(build_hue_rotation(angle), np.zeros(3)))


def _build_recolored_class(number: int) -> TargetFunction:
    """Return the hue rotation of one class of objects, a different class for each of four numbers in a row."""
    mask = has_any_color(OBJECTS[number % len(OBJECTS)][None])
    return choose_by_region(mask, _build_hue_rotation(number), show_image)


def _mask_objects(pictures: Pictures) -> Pixels:
    is_object = ~has_any_color(BACKGROUND)(pictures)
    return np.repeat(np.uint8(255) * is_object[..., None], 3, axis=2)


def _fixed(function: TargetFunction) -> Callable[[int], TargetFunction]:
    return lambda _: function


_negative = build_affine_map(-np.eye(3), np.ones(3))
_blue_on_yellow = build_line_painter(np.array([255, 220, 0], np.uint8), np.array([0, 0, 255], np.uint8))

HELD_OUT: Final[dict[str, HeldOutFamily]] = {
    "new_palette": HeldOutFamily("new_draw", ("seg",), _build_palette, NUM_MEMBERS),
    "new_ramp": HeldOutFamily("new_draw", ("depth",), _build_ramp, NUM_MEMBERS, margin=0.03),
    "inverted_depth": HeldOutFamily("new_draw", ("depth",), _fixed(apply_to("depth", _negative)), margin=0.1),
    "blue_edges_on_yellow": HeldOutFamily("new_draw", ("hed",), _fixed(apply_to("hed", _blue_on_yellow)), margin=0.1),
    "hue_rotation": HeldOutFamily("new_draw", (IMAGE,), _build_hue_rotation, NUM_MEMBERS, margin=0.03),
    "negative": HeldOutFamily("new_draw", (IMAGE,), _fixed(apply_to(IMAGE, _negative)), margin=0.1),
    "object_mask": HeldOutFamily("composition", ("seg",), _fixed(_mask_objects), margin=0.1),
    "class_recolored": HeldOutFamily("composition", (IMAGE, "seg"), _build_recolored_class, NUM_MEMBERS, margin=0.03),
    "normals": HeldOutFamily("unseen", ("normal",), _fixed(lambda pictures: pictures["normal"]), condition="normal"),
    "canny": HeldOutFamily("unseen", (IMAGE,), _fixed(apply_to(IMAGE, find_canny)), condition="canny"),
    "xdog_sketch": HeldOutFamily("unseen", (IMAGE,), _fixed(apply_to(IMAGE, sketch_by_gaussians))),
    "stylization": HeldOutFamily("unseen", (IMAGE,), _fixed(apply_to(IMAGE, stylize))),
    "pencil_sketch": HeldOutFamily("unseen", (IMAGE,), _fixed(apply_to(IMAGE, sketch_by_pencil))),
}
"""The families, by name."""

MISALIGNMENTS: Final = {
    "shifted": build_warp(0.0, 1.0, (0.125, 0.125)),
    "mirrored": build_warp(0.0, 1.0, (0.0, 0.0), is_mirrored=True),
    "cropped": build_warp(0.0, 1.5, (0.0, 0.0)),
}
"""What is done to an example's target, and not to its source, in a misaligned example pair."""


@cache
def build_probe() -> Pictures:
    """Return the pictures of the fixed scenes, side by side, that functions are compared on: all classes, every map."""
    views = [build_scene_pair(_SEED, group, _PROBE_SIZE).edited for group in _PROBE_GROUPS]
    kinds = {
        IMAGE: [view.image for view in views],
        **{name: [view.maps[name] for view in views] for name in views[0].maps},
    }
    return {name: np.concatenate(pictures, axis=1) for name, pictures in kinds.items()}


def resembles_held_out(function: TargetFunction) -> bool:
    """Say whether a function does to the probe what a member of a held-out family does, within the family's margin."""
    members, squares, margins = _show_members()
    shown = _flatten(function(build_probe()))
    distances = squares + np.square(shown).sum() - 2.0 * (members @ shown)
    return bool((distances <= np.square(margins) * shown.size).any())


@cache
def _show_members() -> tuple[Floats, Floats, Floats]:
    """Return what every member makes of the probe, (members, values), the sums of its squares, and the members' margins."""
    numbered = [(family, number) for family in HELD_OUT.values() for number in range(family.num_members)]
    shown = np.stack([_flatten(family.build(number)(build_probe())) for family, number in numbered])
    margins = np.array([family.margin for family, _ in numbered], np.float32)
    return shown, np.square(shown).sum(axis=1), margins


def _flatten(pixels: Pixels) -> Floats:
    return pixels.astype(np.float32).ravel() / np.float32(255.0)
