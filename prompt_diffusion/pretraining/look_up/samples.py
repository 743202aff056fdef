"""What a look-up is trained on: two scenes and members of one family, the same on both, each scene in turn the query."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompt_diffusion.data.families import FAMILIES, IMAGE, Recolor, find_source
from prompt_diffusion.data.sampler import RowOrder, sample_generator
from prompt_diffusion.data.transforms import Pixels, to_model_range
from prompt_diffusion.pretraining.look_up.config import Color, LookUpConfig
from prompt_diffusion.pretraining.objectives import ReadPicture

DEPTH, EDGES, CLASSES = "depth", "hed", "seg"
AUXILIARY_MAPS = (DEPTH, EDGES, CLASSES)
"""The maps of every scene that E's auxiliary targets are made of."""
_COARSE = 4
"""Of every so many pixels, one says which classes a scene shows."""


@dataclass(frozen=True)
class SceneBatch:
    """A micro-batch of n pairs of scenes: the first scene of each, then the second of each, 2 n in all."""

    images: Tensor
    """2 n, 3, H, W in [-1, 1]."""
    classes: Tensor
    """int64 2 n, H, W."""
    maps: Tensor
    """Depth and edges in [0, 1], 2 n, 2, H, W."""
    targets: list[Tensor]
    """What each member of the family makes of the scenes, 2 n, 3, H, W in [-1, 1]; none while E is trained alone."""
    labels: list[int]
    """The kind of target of each pair of scenes, n."""


@dataclass(frozen=True)
class SceneDraw:
    """Everything that is random in one sample."""

    rows: tuple[int, int]
    mirrored: tuple[bool, bool]
    kind: str
    members: list[Recolor]


class SceneSampler:
    """Draws samples from (seed, index) alone; may be used from any thread."""

    def __init__(self, config: LookUpConfig, read: ReadPicture, num_rows: int) -> None:
        """``read``: photographs and maps of ``num_rows`` rows; two rows, even and odd, are twins of one scene."""
        self.config, self.read, self.num_rows = config, read, num_rows
        self.labels = tuple(config.shares)
        self._order = RowOrder(config.seed, (num_rows,))
        self._find_classes = partial(find_classes, colors=config.class_colors)

    def draw(self, index: int) -> SceneDraw:
        """Draw a sample."""
        config, generator = self.config, sample_generator(self.config.seed, index)
        kind = str(generator.choice(self.labels, p=list(config.shares.values())))
        row = self._order.row_at(index)
        candidates = generator.integers(0, self.num_rows, size=config.num_candidates).tolist()
        is_agreeing = bool(generator.random() < config.agreeing_fraction)
        others = [other for other in candidates if other // 2 != row // 2] or [(row + 2) % self.num_rows]
        other = self._choose_agreeing(row, others) if is_agreeing else others[0]
        first, second = (bool(draw < config.mirrored_fraction) for draw in generator.random(2))
        return SceneDraw(
            (row, other), (first, second), kind, [draw_member(kind, generator) for _ in range(config.num_members)]
        )

    def make_batch(self, indices: range, *, has_targets: bool) -> SceneBatch:
        """Read, recolour and stack."""
        draws = [self.draw(index) for index in indices]
        sides = [(draw, side) for side in (0, 1) for draw in draws]
        images: list[Pixels] = []
        maps: dict[str, list[Pixels]] = {name: [] for name in AUXILIARY_MAPS}
        targets: list[list[Pixels]] = [[] for _ in range(self.config.num_members if has_targets else 0)]
        for draw, side in sides:
            read = partial(self._read, row=draw.rows[side], is_mirrored=draw.mirrored[side])
            images.append(read(IMAGE))
            for name, pictures in maps.items():
                pictures.append(read(name))
            for member, pictures in zip(draw.members, targets, strict=False):
                pictures.append(member(read(find_source(draw.kind))))
        grey = np.stack([np.stack(maps[name])[..., 0] for name in (DEPTH, EDGES)], axis=1)
        return SceneBatch(
            images=to_model_range(np.stack(images)),
            classes=torch.from_numpy(np.stack([self._find_classes(picture) for picture in maps[CLASSES]])),
            maps=torch.from_numpy(grey).float() / 255.0,
            targets=[to_model_range(np.stack(pictures)) for pictures in targets],
            labels=[self.labels.index(draw.kind) for draw in draws],
        )

    def _read(self, kind: str, row: int, is_mirrored: bool) -> Pixels:
        picture = self.read(kind, row)
        return np.ascontiguousarray(picture[:, ::-1]) if is_mirrored else picture

    def _choose_agreeing(self, row: int, others: Sequence[int]) -> int:
        """Return the scene whose set of classes has most in common with the row's (intersection over union)."""
        wanted, *found = (self._list_classes(each) for each in (row, *others))
        agreement = [(wanted & each).sum() / (wanted | each).sum() for each in found]
        return others[int(np.argmax(agreement))]

    def _list_classes(self, row: int) -> NDArray[np.bool_]:
        shown = self._find_classes(self.read(CLASSES, row)[::_COARSE, ::_COARSE])
        return np.bincount(shown.ravel(), minlength=len(self.config.class_colors)) > 0


def draw_member(kind: str, generator: np.random.Generator) -> Recolor:
    """Draw a member of a kind's family; of a map itself there is one alone, which leaves it as it is."""
    return FAMILIES[kind].draw(generator) if kind in FAMILIES else lambda pixels: pixels


def find_classes(segmentation: Pixels, colors: Sequence[Color]) -> NDArray[np.int64]:
    """Return the class of each pixel, int64 H, W: the index of its colour; ValueError names a colour that is not there."""
    weights = np.array([1 << 16, 1 << 8, 1])
    codes, known = segmentation.astype(np.int64) @ weights, np.array(colors, np.int64) @ weights
    order = np.argsort(known)
    places = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    classes: NDArray[np.int64] = order[places].astype(np.int64)
    unknown = segmentation[known[classes] != codes]
    if len(unknown):
        raise ValueError(f"class_colors lacks {tuple(unknown[0].tolist())}, a colour of a segmentation map")
    return classes
