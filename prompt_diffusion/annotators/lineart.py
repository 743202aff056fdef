"""Soft line drawings, white on black; this module stays light, torch comes with the build.

Source: Chan et al., Learning to Generate Line Drawings, CVPR 2022; network, pre- and post-processing of controlnet-aux
0.0.10 (``lineart``), which inverts the network's black lines.
"""

from typing import TYPE_CHECKING

from prompt_diffusion.annotators.base import MEGAPIXEL
from prompt_diffusion.annotators.network_spec import Infer, define_network
from prompt_diffusion.annotators.weights import Arrays, HubFile, PublishedWeights

if TYPE_CHECKING:
    from torch import Tensor


def build_lineart(arrays: Arrays, name: str, device: str) -> Infer:
    """Return line drawings at the images' own resolution.

    Sides that are no multiple of 4, or below the 8 pixels that the network needs, are completed by repeating their edge.
    """
    from torch.nn.functional import pad

    from prompt_diffusion.annotators.networks import import_quietly, load_parameters, to_tensors

    with import_quietly():
        from controlnet_aux.lineart import Generator
    network = Generator(3, 1, 3)
    load_parameters(network, to_tensors(arrays), name)
    network.to(device)

    def infer(images: "Tensor") -> "Tensor":
        height, width = images.shape[2:]
        missing = [max(-side % 4, 8 - side) for side in (width, height)]
        values = pad(images.float() / 255.0, (0, missing[0], 0, missing[1]), mode="replicate")
        lines: Tensor = (network(values)[:, 0, :height, :width] * 255.0).clamp(0, 255)
        return 255.0 - lines.floor()

    return infer


LINEART = define_network(
    "lineart",
    "lineart",
    build_lineart,
    PublishedWeights(
        file="lineart-sk_model.pth",
        sha256="c686ced2a666b4850b4bb6ccf0748031c3eda9f822de73a34b8979970d90f0c6",
        source=HubFile(
            repository="lllyasviel/Annotators",
            revision="982e7edaec38759d914a963c48c4726685de7d96",
            path="sk_model.pth",
        ),
        licence="MIT",
    ),
    max_pixels=2 * MEGAPIXEL,
)
