"""The `photos` source: crops of the photographs that scikit-image and scikit-learn ship, with edited twins.

A photograph is a prompt group with one edit; its crops are the seeds. Real pictures, and nothing to download.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.base import SampleKey, SourceOptions
from prompt_diffusion.data.transforms import Pixels, decode_image, encode_png, resize_image
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.manifest import Reject


@dataclass(frozen=True, slots=True)
class Photograph:
    """A file of an installed package, and what it shows."""

    name: str
    package: str
    path: str
    caption: str


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "a portrait of an astronaut in an orange suit"),
    Photograph("chelsea", "skimage", "data/chelsea.png", "a close photo of a tabby cat"),
    Photograph("coffee", "skimage", "data/coffee.png", "a cup of coffee on a wooden table"),
    Photograph("china", "sklearn", "datasets/images/china.jpg", "a temple roof above a wide lake"),
    Photograph("rocket", "skimage", "data/rocket.jpg", "a rocket on a launch pad at night"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png", "a motorcycle parked in a garage"),
    Photograph("hubble", "skimage", "data/hubble_deep_field.jpg", "many galaxies in a dark sky"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "an orange dahlia in front of dark leaves"),
    Photograph("retina", "skimage", "data/retina.jpg", "a medical photo of a retina"),
)


def _to_bytes(values: NDArray[Any]) -> Pixels:
    pixels: Pixels = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _scale_channels(red: float, green: float, blue: float) -> Callable[[Pixels], Pixels]:
    """Return an edit that multiplies the channels."""

    def edit(image: Pixels) -> Pixels:
        values = image.astype(np.float32) * np.array([red, green, blue], dtype=np.float32)
        return _to_bytes(values)

    return edit


def _raise_contrast(image: Pixels) -> Pixels:
    return _to_bytes((image.astype(np.float32) - 128.0) * 1.6 + 128.0)


def _remove_color(image: Pixels) -> Pixels:
    red, green, blue = (image[:, :, channel].astype(np.float32) for channel in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return _to_bytes(np.repeat(grey[:, :, None], 3, axis=2))


def _mirror(image: Pixels) -> Pixels:
    return np.ascontiguousarray(image[:, ::-1])


# instruction -> what it adds to the caption, and what it does to the pixels
EDITS: dict[str, tuple[str, Callable[[Pixels], Pixels]]] = {
    "make it brighter": ("in bright light", _scale_channels(1.5, 1.5, 1.5)),
    "make it darker": ("in dim light", _scale_channels(0.5, 0.5, 0.5)),
    "make it warmer": ("in warm light", _scale_channels(1.25, 1.0, 0.65)),
    "make it cooler": ("in cool light", _scale_channels(0.7, 0.95, 1.3)),
    "make it black and white": ("in black and white", _remove_color),
    "raise the contrast": ("with strong contrast", _raise_contrast),
    "mirror it": ("mirrored", _mirror),
}


class PhotosConfig(SourceOptions):
    """Photographs of installed packages."""

    kind: Literal["photos"] = "photos"
    crops_per_photo: int = Field(default=16, ge=1, le=100_000)
    """Crops of each photograph: the seeds of its prompt group."""
    seed: int = Field(default=0, ge=0)
    """Chooses the crops, and the edit of each photograph."""


class PhotosSource:
    """Cuts squares out of each photograph and edits them."""

    def __init__(self, config: PhotosConfig, image_size: int) -> None:
        self.config, self.image_size = config, image_size

    def digest(self) -> str:
        """Return a digest of the photographs' files, which come with the packages' versions."""
        return compute_digest(b"".join(_locate(photo).read_bytes() for photo in PHOTOGRAPHS))

    def plan(self) -> list[SampleKey]:
        """Return the crops of each photograph."""
        return [
            SampleKey(f"{photo.name}-{crop:04d}", photo.name, crop, file=photo.path, row=place)
            for place, photo in enumerate(PHOTOGRAPHS)
            for crop in range(self.config.crops_per_photo)
        ]

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Cut each crop and edit it."""
        for key in keys:
            photo = PHOTOGRAPHS[key.row]
            instruction = self._choose_edit(key.row)
            words, edit = EDITS[instruction]
            crop = self._cut(key)
            yield ImagePair(
                sample_id=key.sample_id,
                group_id=key.group_id,
                seed=key.seed,
                input_prompt=photo.caption,
                edit_instruction=instruction,
                edited_prompt=f"{photo.caption} {words}",
                input_image=encode_png(crop),
                edited_image=encode_png(edit(crop)),
                split=key.split,
                source_uri=f"{photo.package}/{photo.path}",
            )

    def _choose_edit(self, place: int) -> str:
        """Return the instruction of a photograph: the edits in an order that the seed shuffles, in turn."""
        order = np.random.default_rng([self.config.seed]).permutation(list(EDITS))
        return str(order[place % len(order)])

    def _cut(self, key: SampleKey) -> Pixels:
        """Cut a random square of 45 to 95 % of the shorter side."""
        image = _read_photograph(PHOTOGRAPHS[key.row])
        rng = np.random.default_rng([self.config.seed, key.row, key.seed])
        height, width = image.shape[:2]
        side = int(min(height, width) * rng.uniform(0.45, 0.95))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        return resize_image(image[top : top + side, left : left + side], self.image_size)


def _locate(photo: Photograph) -> Path:
    """Return the photograph's file without importing its package, which would cost seconds."""
    spec = find_spec(photo.package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the photograph {photo.name!r} comes with the package {photo.package}, which is not installed"
        )
    return Path(spec.submodule_search_locations[0]) / photo.path


@lru_cache(maxsize=2)  # crops of a photograph follow each other
def _read_photograph(photo: Photograph) -> Pixels:
    return decode_image(_locate(photo).read_bytes())
