"""What a look-up is worth without diffusion: held-out targets on held-out scenes, beside what needs no look-up.

Errors are RMSE over RGB in [0, 1] (``evaluation/rmse.py``); an example shows the classes of its query, and is of another scene.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prompt_diffusion.data.families import IMAGE
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.transforms import Pixels, to_model_range
from prompt_diffusion.model.look_up.look_up import LookUp
from prompt_diffusion.pretraining.look_up.config import LookUpConfig
from prompt_diffusion.pretraining.look_up.samples import CLASSES, DEPTH, EDGES, find_classes
from prompt_diffusion.pretraining.objectives import ReadPicture
from prompt_diffusion.pretraining.score import HELD_OUT_SEED

Floats = NDArray[np.float64]
Paint = Callable[["Scene"], Floats]
"""A target function: what it makes of a scene, H, W, 3 in [0, 255]."""

NORMALS = "normal"
PALETTE = "new palette"
_BATCH, _CANDIDATES = 8, 256
_YELLOW, _BLUE = (255.0, 220.0, 0.0), (0.0, 0.0, 255.0)
_LEAST_DISTANCE = 90.0
"""Between two colours of a palette, out of 442."""
_FIT_RIDGE = 1e-5
"""Beside mean squares of terms in [0, 1]."""


@dataclass(frozen=True)
class Scene:
    """A photograph with its maps."""

    read: Callable[[str], Pixels]
    classes: NDArray[np.int64]

    def read_floats(self, kind: str) -> Floats:
        """Return a picture as float64 H, W, 3 in [0, 255]."""
        return self.read(kind).astype(np.float64)


@dataclass(frozen=True)
class TargetScore:
    """Errors on one held-out target."""

    rmse: float
    """The look-up's draft."""
    copy: float
    """The example's target as it is."""
    fitted: float
    """A colour map fitted on the pair by least squares, quadratic in colour and height."""
    objects: float | None = None
    """Share of the object pixels nearest to the right colour of the palette; None where there is no palette."""
    objects_copy: float | None = None
    objects_fitted: float | None = None


def _draw_palette(generator: np.random.Generator, count: int) -> Floats:
    while True:
        colors = generator.uniform(0.0, 255.0, (count, 3))
        distances = np.linalg.norm(colors[:, None] - colors, axis=2) + 1e9 * np.eye(count)
        if distances.min() > _LEAST_DISTANCE:
            return colors


def _draw_ramp(generator: np.random.Generator) -> Paint:
    ends = _draw_palette(generator, 2)
    return lambda scene: _mix(ends[0], ends[1], scene.read_floats(DEPTH) / 255.0)


def _mix(low: object, high: object, share: Floats) -> Floats:
    return np.asarray(low) * (1.0 - share) + np.asarray(high) * share


def _turn_hue(generator: np.random.Generator) -> Paint:
    angle = generator.uniform(1.5, 4.7)
    grey, axis = np.full((3, 3), 1 / 3), np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
    matrix = grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * axis
    return lambda scene: (scene.read_floats(IMAGE) @ matrix.T).clip(0.0, 255.0)


def list_targets(
    config: LookUpConfig, query: Scene, generator: np.random.Generator, *, has_normals: bool
) -> dict[str, Paint]:
    """Return one member of every held-out target, and the maps that are trained on; normals where there are maps of them."""
    num_classes, first_object = len(config.class_colors), config.num_background_classes
    palette = _draw_palette(generator, num_classes)
    turn = _turn_hue(generator)
    sizes = np.bincount(query.classes.ravel(), minlength=num_classes)[first_object:]
    edited = first_object + int(np.argmax(sizes))
    normals: dict[str, Paint] = {"normals": lambda scene: scene.read_floats(NORMALS)} if has_normals else {}
    return normals | {
        PALETTE: lambda scene: palette[scene.classes],
        "new ramp": _draw_ramp(generator),
        "inverted depth": lambda scene: 255.0 - scene.read_floats(DEPTH),
        "blue on yellow": lambda scene: _mix(_YELLOW, _BLUE, scene.read_floats(EDGES) / 255.0),
        "object mask": lambda scene: np.repeat((scene.classes >= first_object)[..., None] * 255.0, 3, axis=2),
        "hue turned": turn,
        "negative": lambda scene: 255.0 - scene.read_floats(IMAGE),
        "one class recoloured": lambda scene: np.where(
            (scene.classes == edited)[..., None], turn(scene), scene.read_floats(IMAGE)
        ),
        "depth": lambda scene: scene.read_floats(DEPTH),
        "edges": lambda scene: scene.read_floats(EDGES),
        "segmentation": lambda scene: scene.read_floats(CLASSES),
    }


def fit_color_map(source: Pixels, target: Floats, query: Pixels) -> Floats:
    """Return the query through a ridge least-squares fit of target on source: quadratic in r, g, b and height."""

    def expand(image: Pixels) -> Floats:
        height = np.broadcast_to(np.linspace(0.0, 1.0, len(image))[:, None, None], (*image.shape[:2], 1))
        linear = np.concatenate([image / 255.0, height], axis=2).reshape(-1, 4)
        squares = [linear[:, first] * linear[:, second] for first in range(4) for second in range(first, 4)]
        return np.column_stack([np.ones(len(linear)), linear, *squares])

    terms = expand(source)
    gram = terms.T @ terms / len(terms) + _FIT_RIDGE * np.eye(terms.shape[1])
    weights = np.linalg.solve(gram, terms.T @ target.reshape(-1, 3) / len(terms))
    fitted: Floats = (expand(query) @ weights).reshape(query.shape).clip(0.0, 255.0)
    return fitted


def choose_example(config: LookUpConfig, read: ReadPicture, row: int, num_rows: int) -> int:
    """Return a scene, not the row's own or its twin, that shows the row's classes; the first that misses fewest."""

    def list_classes(each: int) -> set[int]:
        return set(np.unique(find_classes(read(CLASSES, each), config.class_colors)).tolist())

    wanted, best, fewest = list_classes(row), -1, len(config.class_colors) + 1
    for other in sample_generator(HELD_OUT_SEED, row).integers(0, num_rows, size=_CANDIDATES).tolist():
        if other // 2 == row // 2:
            continue
        missing = len(wanted - list_classes(other))
        if missing < fewest:
            best, fewest = other, missing
        if not missing:
            break
    return best


@dataclass
class _Tally:
    """Errors of the three answers (draft, copy, fit) on one target, image by image."""

    errors: list[list[float]]
    rights: list[NDArray[np.bool_]]
    """Which object pixels are nearest to their class's colour of the palette: 3, pixels."""

    def add(self, answers: Sequence[Floats], truth: Floats) -> None:
        self.errors.append([float(np.square((answer - truth) / 255.0).mean()) for answer in answers])

    def add_objects(self, answers: Sequence[Floats], classes: NDArray[np.int64], palette: Floats, first: int) -> None:
        nearest = np.stack([_find_nearest(answer, palette) for answer in answers])
        self.rights.append((nearest == classes)[:, classes >= first])

    def score(self) -> TargetScore:
        right = np.concatenate(self.rights, axis=1).mean(axis=1).tolist() if self.rights else (None, None, None)
        return TargetScore(*np.sqrt(np.mean(self.errors, axis=0)).tolist(), *right)


def score_look_up(
    look_up: LookUp, config: LookUpConfig, read: ReadPicture, num_rows: int, num_scenes: int, *, has_normals: bool
) -> dict[str, TargetScore]:
    """Return the errors on the edited pictures of the first scenes, by target. ``read``: ``num_rows`` held-out rows."""
    tallies: dict[str, _Tally] = {}
    for start in range(0, num_scenes, _BATCH):
        rows = [2 * scene + 1 for scene in range(start, min(start + _BATCH, num_scenes))]
        examples = [choose_example(config, read, row, num_rows) for row in rows]
        queries, shown = ([_open_scene(config, read, row) for row in each] for each in (rows, examples))
        paints = [
            list_targets(config, query, sample_generator(HELD_OUT_SEED, row, 1), has_normals=has_normals)
            for query, row in zip(queries, rows, strict=True)
        ]
        for name in paints[0]:
            targets = [paint[name](scene) for paint, scene in zip(paints, shown, strict=True)]
            drafts = _draw_drafts(look_up, queries, shown, targets)
            tally = tallies.setdefault(name, _Tally([], []))
            for query, scene, paint, target, draft in zip(queries, shown, paints, targets, drafts, strict=True):
                fitted = fit_color_map(scene.read(IMAGE), target, query.read(IMAGE))
                answers = (draft.astype(np.float64), target, fitted)
                tally.add(answers, paint[name](query))
                if name == PALETTE:
                    each_class = Scene(query.read, np.arange(len(config.class_colors))[None])
                    tally.add_objects(answers, query.classes, paint[name](each_class)[0], config.num_background_classes)
    return {name: tally.score() for name, tally in tallies.items()}


def _open_scene(config: LookUpConfig, read: ReadPicture, row: int) -> Scene:
    return Scene(lambda kind: read(kind, row), find_classes(read(CLASSES, row), config.class_colors))


def _find_nearest(image: Floats, colors: Floats) -> NDArray[np.int64]:
    nearest: NDArray[np.int64] = np.linalg.norm(image[:, :, None] - colors, axis=3).argmin(axis=2)
    return nearest


def _draw_drafts(look_up: LookUp, queries: list[Scene], shown: list[Scene], targets: list[Floats]) -> Pixels:
    photographs = (to_model_range(np.stack([scene.read(IMAGE) for scene in scenes])) for scenes in (queries, shown))
    query, source = photographs
    target = to_model_range(torch.from_numpy(np.stack(targets).round().clip(0, 255).astype(np.uint8)))
    return look_up.draft([(source, target)], query).images


def write_scores(scores: Mapping[str, TargetScore]) -> bytes:
    """Return the scores as JSON."""
    return json.dumps({name: asdict(score) for name, score in scores.items()}, indent=2).encode()
