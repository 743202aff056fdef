"""Inverse depth in tensors: MiDaS's network, the range of a map, and normals from its slope."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from prompt_diffusion.annotators.networks import import_quietly

NORMAL_Z = 2.0 * math.pi
"""How flat normals are: the third component before they are made of unit length (published as ``a``)."""
BACKGROUND_THRESHOLD = 0.1
"""Share of the range of inverse depth below which a pixel is background and faces the viewer (published as ``bg_th``)."""


def build_midas_network() -> nn.Module:
    """Return MiDaS's dpt_hybrid (Ranftl et al., arXiv 2103.13413), 123 M parameters: float32 N,3,H,W in, N,H,W out."""
    with import_quietly():
        from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

        network: Any = DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)
    # Its hooks write to one dictionary of their module: networks on two devices would read each other's features.
    trunk, features = network.pretrained.model, dict[str, Tensor]()
    stages = trunk.patch_embed.backbone.stages
    for number, hooked in enumerate((stages[0], stages[1], trunk.blocks[8], trunk.blocks[11]), start=1):
        hooked._forward_hooks.clear()
        hooked.register_forward_hook(lambda _, __, output, key=str(number): features.__setitem__(key, output))
    network.pretrained.activations = features
    return network  # type: ignore[no-any-return]


def round_to_multiple(side: int, multiple: int) -> int:
    """Return the multiple that is nearest to a side, at least one."""
    return max(1, round(side / multiple)) * multiple


def stretch_range(values: Tensor) -> Tensor:
    """Return N,H,W with each image's minimum at 0 and maximum at 1; zeros where it is constant."""
    values = values - values.amin(dim=(1, 2), keepdim=True)
    span = values.amax(dim=(1, 2), keepdim=True)
    return values / torch.where(span > 0, span, torch.ones_like(span))


def compute_normals(depth: Tensor) -> Tensor:
    """Return unit normals N,H,W,3 (x, y, z) of inverse depth N,H,W: Sobel slopes, none in the background.

    Source: annotator/midas of the Prompt Diffusion repository (8ecd2d1), which uses cv2.Sobel of size 3.
    """
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=depth.device)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    rows, columns = (_reflect_border(side) for side in depth.shape[1:])
    slopes = (
        nn.functional.conv2d(depth[:, None, rows][..., columns], kernels)
        * (stretch_range(depth) >= BACKGROUND_THRESHOLD)[:, None]
    )
    normals = torch.cat([slopes, torch.full_like(slopes[:, :1], NORMAL_Z)], dim=1)
    return nn.functional.normalize(normals, dim=1).permute(0, 2, 3, 1)


def _reflect_border(side: int) -> list[int]:
    """Return the indices of a side with one more at each end, as OpenCV reflects; torch's padding refuses a side of 1."""
    return [min(1, side - 1), *range(side), max(side - 2, 0)]
