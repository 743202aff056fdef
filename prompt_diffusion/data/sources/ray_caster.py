"""A small vectorised ray caster: where rays meet four kinds of primitives that stand on a floor.

World: x to the right, y up, z away from the camera; the floor is y = 0. Only operations that IEEE 754 rounds exactly
(+ - * / sqrt) touch the pixels, so the same scene gives the same bytes on every machine.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
SHAPES = ("sphere", "cube", "cylinder", "cone")
FOCAL = 2.0
CAP_RADIUS, CAP_HEIGHT = 0.82, 1.75
CONE_RADIUS, CONE_HEIGHT = 1.0, 2.2
CUBE_HALF = 0.80
SHAPE_RADIUS, SHAPE_HEIGHT = 1.14, 2.2  # bounds of every shape of size 1, whatever its angle
_FAR, _NEAR = np.float32(np.inf), 1e-3


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One primitive on the floor: its place (x, z), its size (world units, a sphere's radius) and angle (radians)."""

    shape: str
    color: str
    x: float
    z: float
    size: float
    angle: float


@dataclass(frozen=True, slots=True)
class View:
    """Where the scene is seen and lit from."""

    camera_height: float
    """World units above the floor."""
    horizon: float
    """Where the horizon lies in the frame: 0 the middle, 1 the top. It stands for the camera's pitch."""
    light_azimuth: float
    """Radians; 0 is behind the camera, positive to its right."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to see; objects stand from left to right as the camera sees them."""

    objects: tuple[SceneObject, ...]
    floor: str
    sky: str
    view: View


def _pitch(view: View) -> tuple[float, float]:
    """Return cosine and sine of the angle by which the camera looks down."""
    length = math.hypot(FOCAL, view.horizon)
    return FOCAL / length, view.horizon / length


def build_rays(view: View, size: int) -> Floats:
    """Return the rays of a (size, size) frame as world directions (3, size * size), row by row.

    A direction has depth FOCAL along the optical axis, so t * FOCAL is the depth of a point t rays away.
    """
    cos, sin = _pitch(view)
    steps = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
    v, u = np.meshgrid(-steps, steps, indexing="ij")
    return np.stack([u, v * cos - FOCAL * sin, FOCAL * cos + v * sin]).reshape(3, -1).astype(np.float32)


def build_rotation(view: View) -> Floats:
    """Return the rotation (3, 3) from world to camera axes: right, up, towards the viewer."""
    cos, sin = _pitch(view)
    return np.array([[1, 0, 0], [0, cos, sin], [0, sin, -cos]], dtype=np.float32)


def project_point(view: View, x: float, y: float, z: float) -> tuple[float, float]:
    """Return where a world point falls in the frame: (right, up), both in [-1, 1] inside it."""
    cos, sin = _pitch(view)
    depth = z * cos - (y - view.camera_height) * sin
    return FOCAL * x / depth, FOCAL * ((y - view.camera_height) * cos + z * sin) / depth


def _to_local(thing: SceneObject, vectors: Floats, *, is_point: bool) -> Floats:
    """Express world vectors (3, N) in the frame of an object of size 1 that stands at the origin."""
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    shift = (thing.x, thing.z) if is_point else (0.0, 0.0)
    x, y, z = vectors[0] - shift[0], vectors[1], vectors[2] - shift[1]
    return np.stack([x * cos - z * sin, y, x * sin + z * cos]) * (1.0 / thing.size)


def _hit_quadratic(a: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats]:
    """Return both roots of a t^2 + 2 b t + c, the nearer first; infinite where there are none."""
    root = np.sqrt(np.maximum(b * b - a * c, 0.0))
    misses = b * b < a * c
    first, second = (-b - root) / a, (-b + root) / a
    return (
        np.where(misses, _FAR, np.minimum(first, second)),
        np.where(misses, _FAR, np.maximum(first, second)),
    )


def intersect(thing: SceneObject, origins: Floats, rays: Floats) -> Floats:
    """Return the distance (N,), in units of the ray's length, at which rays (3, N) enter the object; inf on a miss."""
    ox, oy, oz = _to_local(thing, origins, is_point=True)
    dx, dy, dz = _to_local(thing, rays, is_point=False)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if thing.shape == "sphere":
            oy = oy - 1.0
            distance, _ = _hit_quadratic(
                dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1.0
            )
        elif thing.shape == "cube":
            centred = ((ox, dx), (oy - CUBE_HALF, dy), (oz, dz))
            slabs = [((-CUBE_HALF - o) / d, (CUBE_HALF - o) / d) for o, d in centred]
            enters = np.maximum.reduce([np.minimum(near, far) for near, far in slabs])
            leaves = np.minimum.reduce([np.maximum(near, far) for near, far in slabs])
            distance = np.where(enters <= leaves, enters, _FAR)
        elif thing.shape == "cylinder":
            near, _ = _hit_quadratic(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - CAP_RADIUS**2)
            height = oy + near * dy
            side = np.where((height >= 0) & (height <= CAP_HEIGHT), near, _FAR)
            top = (CAP_HEIGHT - oy) / dy
            x, z = ox + top * dx, oz + top * dz
            top = np.where((x * x + z * z <= CAP_RADIUS**2) & (top > _NEAR), top, _FAR)
            distance = np.minimum(np.where(side > _NEAR, side, _FAR), top)
        else:
            assert thing.shape == "cone", thing.shape
            k = (CONE_RADIUS / CONE_HEIGHT) ** 2
            below = CONE_HEIGHT - oy
            roots = _hit_quadratic(
                dx * dx + dz * dz - k * dy * dy,
                ox * dx + oz * dz + k * below * dy,
                ox * ox + oz * oz - k * below * below,
            )
            near, far = (
                np.where((t > _NEAR) & (oy + t * dy >= 0) & (oy + t * dy <= CONE_HEIGHT), t, _FAR) for t in roots
            )
            distance = np.minimum(near, far)
        return np.where(distance > _NEAR, distance, _FAR).astype(np.float32)


def compute_normals(thing: SceneObject, points: Floats) -> Floats:
    """Return the outward unit normals (3, N) at world points (3, N) of the object's surface."""
    x, y, z = _to_local(thing, points, is_point=True)
    zero = np.zeros_like(x)
    if thing.shape == "sphere":
        local = np.stack([x, y - 1.0, z])
    elif thing.shape == "cube":
        centred = np.stack([x, y - CUBE_HALF, z])
        axis = np.argmax(np.abs(centred), axis=0)
        local = np.where(np.arange(3)[:, None] == axis, np.sign(centred), 0.0)
    elif thing.shape == "cylinder":
        is_top = y > CAP_HEIGHT - 1e-3
        local = np.where(is_top, np.stack([zero, zero + 1.0, zero]), np.stack([x, zero, z]))
    else:
        local = np.stack([x, (CONE_HEIGHT - y) * (CONE_RADIUS / CONE_HEIGHT) ** 2, z])
    x, y, z = local / np.maximum(np.sqrt(local[0] ** 2 + local[1] ** 2 + local[2] ** 2), 1e-6)
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    return np.stack([x * cos + z * sin, y, z * cos - x * sin]).astype(np.float32)


def trace_objects(scene: Scene, size: int) -> Floats:
    """Return the distances (objects, size * size) of each object alone from the camera; inf where it is not."""
    rays = build_rays(scene.view, size)
    eye = np.array([[0.0], [scene.view.camera_height], [0.0]], dtype=np.float32)
    return np.stack([intersect(thing, eye, rays) for thing in scene.objects])
