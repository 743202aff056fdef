"""The ``scenes`` source: an endless world of coloured primitives with captions, edited twins and exact maps.

A prompt group fixes what there is (objects from left to right, floor, sky, the edit), the seed where it stands.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.base import SampleKey, SourceOptions
from prompt_diffusion.data.sources.ray_caster import (
    SHAPE_HEIGHT,
    SHAPE_RADIUS,
    SHAPES,
    Scene,
    SceneObject,
    View,
    project_point,
    trace_objects,
)
from prompt_diffusion.data.sources.scene_renderer import COLORS, FLOORS, SKIES, SceneView, render_scene
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.store.manifest import Reject

_SIZES = {1: (1.05, 1.60), 2: (0.88, 1.40), 3: (0.72, 1.15)}  # by the number of objects, so that they fill the frame
_DEPTHS, _CAMERA_HEIGHTS, _HORIZONS, _AZIMUTHS = (2.8, 7.0), (1.8, 3.0), (0.08, 0.92), (-1.25, 1.25)
_HEAD_ON = View(camera_height=2.3, horizon=0.6, light_azimuth=0.0)
_PROBE_SIZE = 32  # pixels of the frame in which a layout's visibility is judged


@dataclass(frozen=True, slots=True)
class ScenePair:
    """A scene and its edited twin, rendered, with the three texts of an image pair."""

    input_scene: Scene
    edited_scene: Scene
    input: SceneView
    edited: SceneView
    input_prompt: str
    edit_instruction: str
    edited_prompt: str


def build_scene_pair(seed: int, index: int, image_size: int, pair: int = 0) -> ScenePair:
    """Build pair number ``pair`` of prompt group ``index`` of the world ``seed``, at (image_size, image_size) pixels."""
    content = np.random.default_rng([seed, index])
    things = _draw_things(content)
    floor, sky = str(content.choice(list(FLOORS))), str(content.choice(list(SKIES)))
    blank = Scene(things, floor, sky, _HEAD_ON)
    edited, instruction = _draw_edit(blank, content)
    layout, view = _draw_layout(blank, edited, np.random.default_rng([seed, index, pair + 1]))
    before, after = (_place(scene, layout, view) for scene in (blank, edited))
    return ScenePair(
        input_scene=before,
        edited_scene=after,
        input=render_scene(before, image_size),
        edited=render_scene(after, image_size),
        input_prompt=describe_scene(before),
        edit_instruction=instruction,
        edited_prompt=describe_scene(after),
    )


def describe_scene(scene: Scene) -> str:
    """Return the caption: every object with its colour from left to right, then the floor and the sky."""
    things = " left of ".join(_with_article(f"{item.color} {item.shape}") for item in scene.objects)
    return f"{things} on {_with_article(scene.floor)} floor under {_with_article(scene.sky)} sky"


def mirror_caption(caption: str) -> str:
    """Return the caption of the mirrored picture of a scene: the objects in the other order; ValueError for other captions."""
    things, on, place = caption.partition(" on ")
    if not on or " floor under " not in place:
        raise ValueError(f"only captions of scenes can be mirrored, not {caption!r}")
    return " left of ".join(reversed(things.split(" left of "))) + on + place


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _draw_things(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Draw one to three objects, no two of one colour, not yet placed."""
    count = int(rng.choice([1, 2, 3], p=[0.25, 0.4, 0.35]))
    colors = rng.permutation(list(COLORS))[:count]
    return tuple(SceneObject(str(rng.choice(SHAPES)), str(color), 0.0, 1.0, 1.0, 0.0) for color in colors)


def _draw_edit(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """Draw one edit: the edited scene and its instruction."""
    kind = str(rng.choice(["color", "shape", "floor", "sky"], p=[0.3, 0.3, 0.2, 0.2]))
    if kind == "floor":
        floor = _choose_other(FLOORS, [scene.floor], rng)
        return replace(scene, floor=floor), f"make the floor {floor}"
    if kind == "sky":
        sky = _choose_other(SKIES, [scene.sky], rng)
        return replace(scene, sky=sky), f"make the sky {sky}"
    place = int(rng.integers(len(scene.objects)))
    old = scene.objects[place]
    if kind == "color":
        new = replace(old, color=_choose_other(COLORS, [item.color for item in scene.objects], rng))
        instruction = f"make the {old.color} {old.shape} {new.color}"
    else:
        new = replace(old, shape=_choose_other(SHAPES, [old.shape], rng))
        instruction = f"turn the {old.color} {old.shape} into {_with_article(new.shape)}"
    return replace(scene, objects=(*scene.objects[:place], new, *scene.objects[place + 1 :])), instruction


def _choose_other(names: Iterable[str], taken: list[str], rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in names if name not in taken]))


Spot = tuple[float, float, float, float]  # x, z, size, angle of one object


def _draw_layout(before: Scene, after: Scene, rng: np.random.Generator) -> tuple[list[Spot], View]:
    """Draw spots, from left to right, where the objects of both twins stand apart and mostly visible in the frame."""
    for _ in range(2_000):
        view = View(*(float(rng.uniform(*limits)) for limits in (_CAMERA_HEIGHTS, _HORIZONS, _AZIMUTHS)))
        layout: list[Spot] = []
        for _ in range(30 * len(before.objects)):
            spot = _draw_spot(len(before.objects), rng)
            if _is_inside(spot, view) and all(_stand_apart(spot, other, view) for other in layout):
                layout.append(spot)
            if len(layout) == len(before.objects):
                layout.sort(key=lambda spot: _project_middle(spot, view))
                if all(_is_visible(_place(scene, layout, view)) for scene in (before, after)):
                    return layout, view
                break
    raise AssertionError("no layout found: the ranges of sizes and depths leave no room")


def _draw_spot(num_objects: int, rng: np.random.Generator) -> Spot:
    """Draw where one object might stand; its side follows its depth, so that near and far are as likely to fit."""
    depth = float(rng.uniform(*_DEPTHS))
    return depth * float(rng.uniform(-0.5, 0.5)), depth, float(rng.uniform(*_SIZES[num_objects])), rng.uniform() * 1.57


def _place(scene: Scene, layout: list[Spot], view: View) -> Scene:
    """Put the objects of a scene at the places of a layout."""
    placed = tuple(
        replace(item, x=x, z=z, size=size, angle=angle)
        for item, (x, z, size, angle) in zip(scene.objects, layout, strict=True)
    )
    return replace(scene, objects=placed, view=view)


def _project_middle(spot: Spot, view: View) -> float:
    """Return how far to the right an object's middle appears, in [-1, 1] inside the frame."""
    x, z, size, _ = spot
    return project_point(view, x, size, z)[0]


def _is_inside(spot: Spot, view: View) -> bool:
    """Say whether the bounds of an object at the spot lie inside the frame."""
    x, z, size, _ = spot
    reach, height = SHAPE_RADIUS * size, SHAPE_HEIGHT * size
    corners = [project_point(view, x + side, y, z - 0.7 * reach) for side in (-reach, reach) for y in (0.0, height)]
    return max(abs(value) for corner in corners for value in corner) < 0.97


def _stand_apart(one: Spot, other: Spot, view: View) -> bool:
    """Say whether two objects leave a gap on the floor and one is clearly left of the other."""
    gap = math.hypot(one[0] - other[0], one[1] - other[1]) - SHAPE_RADIUS * (one[2] + other[2])
    return gap > 0.1 and abs(_project_middle(one, view) - _project_middle(other, view)) > 0.3


def _is_visible(scene: Scene) -> bool:
    """Say whether most of every object is in view, nearer objects considered."""
    distances = trace_objects(scene, _PROBE_SIZE)
    covered = np.isfinite(distances).sum(axis=1)
    first = np.where(np.isfinite(distances.min(axis=0)), np.argmin(distances, axis=0), -1)
    seen = np.array([(first == place).sum() for place in range(len(distances))])
    return bool((seen >= 0.65 * covered).all() and (seen >= 0.012 * _PROBE_SIZE**2).all())


class ScenesConfig(SourceOptions):
    """A world of coloured primitives, made from a seed alone."""

    kind: Literal["scenes"] = "scenes"
    num_groups: int = Field(default=1500, ge=1, le=1_000_000)
    """Prompt groups: contents with one edit each."""
    pairs_per_group: int = Field(default=1, ge=1, le=10_000)
    """Pairs of each prompt group: the same content, placed, seen and lit differently."""
    seed: int = Field(default=0, ge=0)
    """Which world."""


class ScenesSource:
    """Renders what the configuration says; nothing is read and nothing can be damaged."""

    def __init__(self, config: ScenesConfig, image_size: int) -> None:
        self.config, self.image_size = config, image_size

    def digest(self) -> str:
        """Return "": the configuration says all."""
        return ""

    def plan(self) -> list[SampleKey]:
        """Return every pair of every group."""
        return [
            SampleKey(f"{group:06d}-{pair}", f"{group:06d}", pair, row=group)
            for group in range(self.config.num_groups)
            for pair in range(self.config.pairs_per_group)
        ]

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Render each key, with the exact maps of both twins."""
        for key in keys:
            pair = build_scene_pair(self.config.seed, key.row, self.image_size, key.seed)
            yield ImagePair(
                sample_id=key.sample_id,
                group_id=key.group_id,
                seed=key.seed,
                input_prompt=pair.input_prompt,
                edit_instruction=pair.edit_instruction,
                edited_prompt=pair.edited_prompt,
                input_image=encode_png(pair.input.image),
                edited_image=encode_png(pair.edited.image),
                split=key.split,
                source_uri=f"scenes/{self.config.seed}/{key.sample_id}",
                exact_maps={
                    name: (encode_png(of_input), encode_png(pair.edited.maps[name]))
                    for name, of_input in pair.input.maps.items()
                },
            )
