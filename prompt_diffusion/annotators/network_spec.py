"""How a network becomes a row of the table: a function from weights to inference; imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prompt_diffusion.annotators.base import (
    MOST_PIXELS,
    AnnotateResources,
    Annotator,
    AnnotatorSpec,
    Condition,
    ImageBatch,
    check_images,
)
from prompt_diffusion.annotators.weights import Arrays, PublishedWeights, parse_arrays, read_weights

if TYPE_CHECKING:
    from torch import Tensor

Infer = Callable[["Tensor"], "Tensor"]
"""Levels 0 to 255, grey float N,H,W or colours N,H,W,3, of RGB images uint8 N,3,H,W, all on one device."""
BuildInfer = Callable[[Arrays, str, str], Infer]
"""From the weights' arrays, their name for messages, and a torch device."""


@dataclass(frozen=True, slots=True)
class NetworkAnnotator:
    """A network on a device, behind the annotator protocol."""

    name: str
    version: int
    weights_digest: str
    infer: Infer
    device: str
    max_pixels: int = MOST_PIXELS
    """Of one image; a GPU is given as many at once as four of that size."""

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Return the maps, at the images' own resolution."""
        check_images(images)
        import torch

        from prompt_diffusion.annotators.networks import to_device, to_maps

        if not len(images):
            return images.copy()
        # A CPU's cores share one image as well as several, and its caches hold one better; a GPU has memory for several.
        num_pixels = images.shape[1] * images.shape[2]
        at_once = 1 if self.device == "cpu" else max(1, 4 * self.max_pixels // num_pixels)
        with torch.inference_mode():
            batches = to_device(images, self.device).split(at_once)  # type: ignore[no-untyped-call]
            return np.concatenate([to_maps(self.infer(batch)) for batch in batches])


def define_network(
    name: str,
    condition: Condition,
    build_infer: BuildInfer,
    weights: PublishedWeights,
    *,
    max_pixels: int,
    version: int = 2,
) -> AnnotatorSpec:
    """Return the row of a network whose weights are read, checked and handed to ``build_infer`` when it is built."""

    def build(spec: AnnotatorSpec, digest: str, resources: AnnotateResources) -> Annotator:
        import torch

        if resources.num_threads is not None:
            torch.set_num_threads(resources.num_threads)
        file = read_weights(weights, digest, resources)
        infer = build_infer(parse_arrays(file), file.name, resources.device)
        return NetworkAnnotator(spec.name, spec.version, digest, infer, resources.device, spec.max_pixels)

    return AnnotatorSpec(
        name=name, condition=condition, version=version, build=build, weights=weights, max_pixels=max_pixels
    )
