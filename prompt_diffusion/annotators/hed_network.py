"""The holistically-nested edge network: a VGG-16 trunk, one side output a block, all upsampled and fused.

Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015 (arXiv 1504.06375). Three trainings of it are in use, and they
differ in what surrounds the trunk; ``HedVariant`` names the differences, ``convert_arrays`` the parameters' names.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from prompt_diffusion.annotators.networks import load_parameters
from prompt_diffusion.annotators.weights import Arrays

BLOCKS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""Channels in, channels out and number of convolutions of each block of the trunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HedVariant:
    """How one training of the network reads images and writes maps."""

    is_bgr: bool
    mean: tuple[float, float, float] | None
    """What is subtracted from the channels, in their order, in grey levels; None: the weights bring it (``mean``)."""
    fuse: Literal["learned", "mean"]
    """The logits' fusion: a learned 1 x 1 convolution, or their plain mean."""
    ceil_pool: bool
    """Whether pooling an odd side keeps the last row or column (Keras' ``same``) or drops it (torch's default)."""
    is_rounded: bool
    """Whether probabilities become the nearest grey level or, as numpy's cast does, the one below."""


class HedNetwork(nn.Module):
    """The network; ``forward`` gives what the paper calls the side outputs and the fused output, as logits."""

    mean: Tensor

    def __init__(self, variant: HedVariant) -> None:
        super().__init__()
        self.variant = variant
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(channels_in if index == 0 else channels_out, channels_out, 3, padding=1)
                for index in range(num_convolutions)
            )
            for channels_in, channels_out, num_convolutions in BLOCKS
        )
        self.sides = nn.ModuleList(nn.Conv2d(channels_out, 1, 1) for _, channels_out, _ in BLOCKS)
        self.fuse = nn.Conv2d(len(BLOCKS), 1, 1) if variant.fuse == "learned" else None
        self.register_buffer("mean", torch.tensor(variant.mean or (0.0, 0.0, 0.0)).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return five side logits and the fused logits, N,1,H,W each, of RGB images N,3,H,W in grey levels 0 to 255."""
        features = (images.flip(1) if self.variant.is_bgr else images) - self.mean
        size = images.shape[2:]
        sides = []
        for index, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            assert isinstance(block, nn.ModuleList)
            if index > 0:
                # Dropping the last row of a one-pixel side would leave none: images below 16 px keep it.
                keeps_last = self.variant.ceil_pool or min(features.shape[2:]) < 2
                features = functional.max_pool2d(features, 2, ceil_mode=keeps_last)
            for convolution in block:
                features = functional.relu(convolution(features))
            sides.append(functional.interpolate(side(features), size=size, mode="bilinear", align_corners=False))
        stacked = torch.cat(sides, dim=1)
        return sides, stacked.mean(dim=1, keepdim=True) if self.fuse is None else self.fuse(stacked)


def convert_arrays(arrays: Arrays) -> dict[str, Tensor]:
    """Return our state dict from any layout in use: Keras', network-bsds500's, ControlNet 1.1's, or our own."""
    converted: dict[str, Tensor] = {}
    for name, array in arrays.items():
        for pattern, rename in _LAYOUTS:
            match = re.fullmatch(pattern, name)
            if match:
                converted[rename(match)] = torch.from_numpy(np.ascontiguousarray(_to_torch_order(name, array)))
                break
        else:
            converted[name] = torch.from_numpy(np.ascontiguousarray(array))
    return converted


def load_hed_network(variant: HedVariant, arrays: Arrays, name: str) -> HedNetwork:
    """Return the network in evaluation mode; ValueError names the weights and the first parameter that does not fit."""
    network = HedNetwork(variant)
    state = convert_arrays(arrays)
    if variant.mean is not None:
        state.setdefault("mean", network.mean)
    load_parameters(network, state, name)
    return network


def _to_torch_order(name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray:
    """Keras keeps kernels as height, width, in, out; torch as out, in, height, width."""
    return array.transpose(3, 2, 0, 1) if name.endswith("/vars/0") else array


_NUMBER_WORDS = {"One": 0, "Two": 1, "Thr": 2, "Fou": 3, "Fiv": 4}
_PARAMETERS = ("weight", "bias")
_WORD = "(One|Two|Thr|Fou|Fiv)"


def _keras_block(match: re.Match[str]) -> str:
    return f"blocks.{int(match[1]) - 1}.{match[2] or 0}.{_PARAMETERS[int(match[3])]}"


def _bsds500_block(match: re.Match[str]) -> str:
    """In a sequence (pool,) convolution, ReLU, convolution, ReLU... the first block has no pool before it."""
    block, position = _NUMBER_WORDS[match[1]], int(match[2])
    return f"blocks.{block}.{(position - (block > 0)) // 2}.{match[3]}"


_LAYOUTS = (
    (r"block(\d)/layers/conv2d(?:_(\d))?/vars/([01])", _keras_block),
    (r"dsn(\d)/vars/([01])", lambda match: f"sides.{int(match[1]) - 1}.{_PARAMETERS[int(match[2])]}"),
    (r"fuse/vars/([01])", lambda match: f"fuse.{_PARAMETERS[int(match[1])]}"),
    (rf"(?:module|net)Vgg{_WORD}\.(\d)\.(weight|bias)", _bsds500_block),
    (rf"(?:module|net)Score{_WORD}\.(weight|bias)", lambda match: f"sides.{_NUMBER_WORDS[match[1]]}.{match[2]}"),
    (r"(?:module|net)Combine\.0\.(weight|bias)", lambda match: f"fuse.{match[1]}"),
    (r"block(\d)\.convs\.(\d)\.(weight|bias)", lambda match: f"blocks.{int(match[1]) - 1}.{match[2]}.{match[3]}"),
    (r"block(\d)\.projection\.(weight|bias)", lambda match: f"sides.{int(match[1]) - 1}.{match[2]}"),
    (r"norm", lambda match: "mean"),
)
