"""The picture of a scene and its exact condition maps: depth, soft edges, segmentation and surface normals.

Everything is computed on a grid of twice the size and reduced 2 x 2 (averages; a vote for the segmentation).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prompt_diffusion.data.sources.ray_caster import (
    FOCAL,
    SHAPE_RADIUS,
    SHAPES,
    Floats,
    Scene,
    build_rays,
    build_rotation,
    compute_normals,
    intersect,
    trace_objects,
)

Image = NDArray[np.uint8]

CLASSES = ("sky", "floor", *SHAPES)
PALETTE: Image = np.array(
    [[6, 30, 230], [80, 50, 50], [255, 30, 60], [4, 250, 7], [255, 200, 0], [200, 70, 255]], dtype=np.uint8
)
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.48, 0.04),
    "yellow": (0.95, 0.84, 0.10),
    "green": (0.12, 0.58, 0.18),
    "teal": (0.08, 0.68, 0.72),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.52, 0.16, 0.74),
    "white": (0.93, 0.93, 0.93),
}
FLOORS: dict[str, tuple[float, float, float]] = {
    "grey": (0.56, 0.57, 0.58),
    "sandy": (0.82, 0.72, 0.50),
    "pink": (0.86, 0.52, 0.57),
    "navy": (0.24, 0.32, 0.54),
    "olive": (0.46, 0.54, 0.26),
    "brown": (0.50, 0.33, 0.22),
    "black": (0.17, 0.17, 0.19),
}
# name -> colour overhead, colour at the horizon, colour and strength of the light
SKIES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]] = {
    "clear": ((0.22, 0.48, 0.92), (0.72, 0.86, 0.98), (1.00, 0.98, 0.94)),
    "cloudy": ((0.52, 0.54, 0.58), (0.74, 0.75, 0.77), (0.88, 0.89, 0.92)),
    "evening": ((0.46, 0.22, 0.46), (0.99, 0.62, 0.30), (1.00, 0.90, 0.80)),
    "night": ((0.03, 0.04, 0.12), (0.14, 0.16, 0.32), (0.70, 0.74, 0.88)),
    "misty": ((0.90, 0.92, 0.94), (0.97, 0.97, 0.96), (0.97, 0.97, 0.96)),
}


@dataclass(frozen=True, slots=True)
class SceneView:
    """One rendered scene: the picture and its maps by condition, each uint8 of shape (S, S, 3)."""

    image: Image
    maps: dict[str, Image]


@dataclass(frozen=True, slots=True)
class _Surfaces:
    """What the rays of a frame meet first; N rays."""

    distance: Floats
    """(N,) in ray lengths; inf for the sky."""
    thing: NDArray[np.int64]
    """(N,) 0 sky, 1 floor, 2 + index of the object."""
    classes: NDArray[np.int64]
    """(N,) index into CLASSES."""
    points: Floats
    """(3, N) world; the camera's own place for the sky."""
    normals: Floats
    """(3, N) world; zero for the sky."""


def render_scene(scene: Scene, image_size: int) -> SceneView:
    """Render a scene at (image_size, image_size): the picture and the maps "depth", "hed", "seg" and "normal".

    Depth is inverse depth, min-max in each image, near is bright; hed is white on black; seg has PALETTE's six
    colours; normals are in camera space (right, up, towards the viewer) as (n + 1) / 2, black where there is sky.
    """
    size = 2 * image_size
    surfaces = _find_surfaces(scene, size)
    picture = _shade(scene, surfaces, size)
    inverse = _reduce((1.0 / (surfaces.distance * FOCAL))[None], size)
    depth = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    votes = np.arange(len(CLASSES))[:, None] == surfaces.classes
    classes = np.argmax(_reduce(votes.astype(np.float32), size), axis=0)
    maps = {
        "depth": _to_bytes(np.repeat(depth, 3, axis=0)),
        "hed": _to_bytes(np.repeat(_draw_edges(surfaces, picture, size)[None], 3, axis=0)),
        "seg": PALETTE[classes],
        "normal": _draw_normals(scene, surfaces, size),
    }
    return SceneView(_to_bytes(_reduce(picture, size)), maps)


def _reduce(values: Floats, size: int) -> Floats:
    """Average (C, size * size) over 2 x 2 cells into (C, size / 2, size / 2)."""
    grid = values.reshape(len(values), size, size)
    return (grid[:, ::2, ::2] + grid[:, 1::2, ::2] + grid[:, ::2, 1::2] + grid[:, 1::2, 1::2]) * 0.25


def _to_bytes(values: Floats) -> Image:
    """Turn (3, S, S) in [0, 1] into uint8 (S, S, 3)."""
    pixels: Image = np.clip(values * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _dot(a: Floats, b: Floats) -> Floats:
    product: Floats = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def _find_surfaces(scene: Scene, size: int) -> _Surfaces:
    """Find what each ray of a (size, size) frame meets first."""
    rays = build_rays(scene.view, size)
    floor = np.where(rays[1] < 0, -scene.view.camera_height / np.minimum(rays[1], -1e-6), np.inf).astype(np.float32)
    sky = np.full_like(floor, np.inf)
    distances = np.concatenate([sky[None], floor[None], trace_objects(scene, size)])
    thing = np.argmin(distances, axis=0)
    distance = np.min(distances, axis=0)
    points = rays * np.where(thing > 0, distance, 0.0)
    points[1] += scene.view.camera_height
    normals = np.zeros_like(rays)
    normals[1] = thing == 1
    for index, item in enumerate(scene.objects):
        (hit,) = np.nonzero(thing == index + 2)
        normals[:, hit] = compute_normals(item, points[:, hit])
    classes = np.array([0, 1, *(CLASSES.index(item.shape) for item in scene.objects)])[thing]
    return _Surfaces(distance, thing, classes, points, normals)


def _shade(scene: Scene, surfaces: _Surfaces, size: int) -> Floats:
    """Light the surfaces: picture (3, N) in [0, 1] with checker, shadow, specular highlights and fog."""
    rays = build_rays(scene.view, size)
    zenith, horizon, light_color = (np.array(c, dtype=np.float32)[:, None] for c in SKIES[scene.sky])
    light = _aim_light(scene.view.light_azimuth)
    lit = _cast_shadows(scene, surfaces, light)
    x, _, z = surfaces.points
    checker = 0.96 + 0.08 * ((np.floor(x / 1.3) + np.floor(z / 1.3)) % 2)
    albedo = np.array([(0, 0, 0), FLOORS[scene.floor], *(COLORS[o.color] for o in scene.objects)], dtype=np.float32)
    color = albedo.T[:, surfaces.thing] * np.where(surfaces.thing == 1, checker * _occlude_floor(scene, x, z), 1.0)

    length = np.sqrt(_dot(rays, rays))
    normals = surfaces.normals
    diffuse = np.maximum(_dot(normals, light), 0.0) * lit
    half = light - rays / length
    shine = np.maximum(_dot(normals, half), 0.0) / np.sqrt(_dot(half, half))
    for _ in range(5):  # to the 32nd power by squaring, which rounds alike everywhere
        shine = shine * shine
    ambient = 0.36 + 0.10 * normals[1]
    color = color * (ambient * (0.5 + 0.5 * light_color) + 0.72 * diffuse * light_color)
    color += np.where(surfaces.thing > 1, 0.42 * shine * lit, 0.0) * light_color

    steps = np.where(surfaces.thing > 0, surfaces.distance * length / 19.0, 0.0)
    fog = 1.0 - 1.0 / (1.0 + steps * steps)
    rise = np.clip(rays[1] / (0.34 * length), 0.0, 1.0)
    sky = horizon + (zenith - horizon) * rise
    picture: Floats = np.where(surfaces.thing > 0, color + (horizon - color) * fog, sky)
    return np.clip(picture, 0.0, 1.0).astype(np.float32)


def _aim_light(azimuth: float) -> Floats:
    """Return the unit vector (3, 1) towards the light; azimuth 0 is behind the camera, positive to its right."""
    across, up = math.cos(0.80), math.sin(0.80)
    return np.array([[math.sin(azimuth) * across], [up], [-math.cos(azimuth) * across]], dtype=np.float32)


def _cast_shadows(scene: Scene, surfaces: _Surfaces, light: Floats) -> Floats:
    """Return 1 where the light arrives and 0 where another object stands in its way (N,); every shape is convex."""
    lit = np.ones_like(surfaces.distance)
    for index, item in enumerate(scene.objects):
        x, z = surfaces.points[0] - item.x, surfaces.points[2] - item.z
        near = (surfaces.thing > 0) & (surfaces.thing != index + 2) & (x * x + z * z < (4.0 * item.size) ** 2)
        (reach,) = np.nonzero(near)
        blocked = np.isfinite(intersect(item, surfaces.points[:, reach], light))
        lit[reach[blocked]] = 0.0
    return lit


def _occlude_floor(scene: Scene, x: Floats, z: Floats) -> Floats:
    """Return how much of the ambient light the objects leave to the floor at (x, z): darker where they stand."""
    open_sky = np.ones_like(x)
    for item in scene.objects:
        away = np.sqrt((x - item.x) ** 2 + (z - item.z) ** 2) / (SHAPE_RADIUS * item.size)
        open_sky *= 1.0 - 0.35 * np.clip(1.6 - away, 0.0, 1.0)
    return open_sky


def _draw_edges(surfaces: _Surfaces, picture: Floats, size: int) -> Floats:
    """Return soft edges (size / 2, size / 2) in [0, 1]: borders of things, creases, and steps of luminance."""
    thing = surfaces.thing.reshape(size, size)
    normals = surfaces.normals.reshape(3, size, size)
    luminance = (0.30 * picture[0] + 0.59 * picture[1] + 0.11 * picture[2]).reshape(size, size)
    edges = np.zeros((size, size), dtype=np.float32)
    for axis in (0, 1):
        here = (slice(None), slice(-1)) if axis else (slice(-1), slice(None))
        there = (slice(None), slice(1, None)) if axis else (slice(1, None), slice(None))
        border = thing[here] != thing[there]
        crease = _dot(normals[:, *here], normals[:, *there]) < 0.80
        step = np.clip((np.abs(luminance[here] - luminance[there]) - 0.09) * 5.0, 0.0, 0.7)
        strength = np.where(border, 1.0, np.where(crease & (thing[here] > 1), 0.85, step)).astype(np.float32)
        edges[here] = np.maximum(edges[here], strength)
        edges[there] = np.maximum(edges[there], strength)
    soft: Floats = np.pad(_reduce(edges.reshape(1, -1), size)[0], 1, mode="edge")
    soft = soft[:-2] + 2.0 * soft[1:-1] + soft[2:]
    soft = (soft[:, :-2] + 2.0 * soft[:, 1:-1] + soft[:, 2:]) / 16.0
    clipped: Floats = np.clip(1.4 * soft, 0.0, 1.0)
    return clipped


def _draw_normals(scene: Scene, surfaces: _Surfaces, size: int) -> Image:
    """Return camera-space normals as an image, black for the sky."""
    camera = np.stack([_dot(row[:, None], surfaces.normals) for row in build_rotation(scene.view)])
    mean = _reduce(camera, size)
    unit = mean / np.maximum(np.sqrt(_dot(mean, mean)), 1e-6)
    is_surface = _reduce((surfaces.thing > 0).astype(np.float32)[None], size) >= 0.5
    return _to_bytes(np.where(is_surface, (unit + 1.0) * 0.5, 0.0))
