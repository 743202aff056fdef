"""Depth maps, near is bright, and surface normals from depth; this module stays light, torch comes with the build.

Source of each pre- and post-processing: ``depth_midas``, ``normal_midas``: annotator/midas of the Prompt Diffusion repository
(8ecd2d1), the network of controlnet-aux 0.0.10; ``depth_anything_v2``: the depth-estimation pipeline of transformers.
The digest of MiDaS's file begins with the eight digits in its published name.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from prompt_diffusion.annotators.base import MEGAPIXEL
from prompt_diffusion.annotators.network_spec import Infer, define_network
from prompt_diffusion.annotators.weights import Arrays, HubFile, PublishedWeights

if TYPE_CHECKING:
    from torch import Tensor


def build_midas_depth(arrays: Arrays, name: str, device: str) -> Infer:
    """Return depth maps from 0 (far) to 255 (near), each image's own range; a constant prediction gives zeros."""
    from prompt_diffusion.annotators.relief import stretch_range

    predict = build_midas(arrays, name, device)
    return lambda images: stretch_range(predict(images)) * 255.0


def build_midas_normals(arrays: Arrays, name: str, device: str) -> Infer:
    """Return normals as colours, x, y, z as R, G, B: the published order, which controlnet-aux turns round."""
    from prompt_diffusion.annotators.relief import compute_normals

    predict = build_midas(arrays, name, device)
    return lambda images: compute_normals(predict(images)) * 127.5 + 127.5


def build_midas(arrays: Arrays, name: str, device: str) -> "Callable[[Tensor], Tensor]":
    """Return inverse depth float32 N,H,W of uint8 N,3,H,W by MiDaS's dpt_hybrid, at the images' own resolution.

    It takes multiples of 32 pixels. Other images are resized to the nearest ones and the prediction back, bilinearly.
    """
    from threading import Lock

    from torch.nn.functional import interpolate

    from prompt_diffusion.annotators.networks import load_parameters, to_tensors
    from prompt_diffusion.annotators.relief import build_midas_network, round_to_multiple

    network = build_midas_network()
    load_parameters(network, to_tensors(arrays), name)
    network.to(device)
    # A forward pass reads back what its hooks wrote: threads that share a network would read each other's features.
    one_at_a_time = Lock()

    def run(values: "Tensor") -> "Tensor":
        with one_at_a_time:
            prediction: Tensor = network(values)
            return prediction

    def predict(images: "Tensor") -> "Tensor":
        values, size = images.float() / 127.5 - 1.0, tuple(images.shape[2:])
        inner = tuple(round_to_multiple(side, 32) for side in size)
        if inner == size:
            return run(values)
        values = interpolate(values, inner, mode="bilinear", antialias=True, align_corners=False)
        return interpolate(run(values)[:, None], size, mode="bilinear", align_corners=False)[:, 0]

    return predict


def build_depth_anything(arrays: Arrays, name: str, device: str) -> Infer:
    """Return depth maps, near is bright, by Depth Anything V2 (Small)."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    from prompt_diffusion.annotators.networks import load_transformer

    backbone = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        out_features=["stage3", "stage6", "stage9", "stage12"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(backbone_config=backbone)
    network = load_transformer(DepthAnythingForDepthEstimation, config, arrays, name)
    return wrap_depth_anything(network.to(device), 518)


def wrap_depth_anything(network: Callable[..., object], size: int) -> Infer:
    """Put transformers' pre- and post-processing around a network: about ``size`` pixels a side, bicubic in and out."""
    import torch
    from transformers import DPTImageProcessor
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from prompt_diffusion.annotators.relief import stretch_range

    processor = DPTImageProcessor(
        size={"height": size, "width": size},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        do_pad=False,
        image_mean=IMAGENET_DEFAULT_MEAN,  # the processor's own default is 0.5, MiDaS's
        image_std=IMAGENET_DEFAULT_STD,
    )

    def infer(images: "Tensor") -> "Tensor":
        inputs = processor(images=list(images.contiguous()), device=images.device, return_tensors="pt")
        sizes = [tuple(images.shape[2:])] * len(images)
        found = processor.post_process_depth_estimation(network(**inputs), sizes)
        return stretch_range(torch.stack([each["predicted_depth"] for each in found])) * 255.0

    return infer


MIDAS_WEIGHTS = PublishedWeights(
    file="dpt_hybrid-midas-501f0c75.pt",
    sha256="501f0c75b3bca7daec6b3682c5054c09b366765aef6fa3a09d03a5cb4b230853",
    source=HubFile(
        repository="lllyasviel/ControlNet",
        revision="38a62cbf79862c1bac73405ec8dc46133aee3e36",
        path="annotator/ckpts/dpt_hybrid-midas-501f0c75.pt",
    ),
    licence="MIT",
)
DEPTH_MIDAS = define_network("depth_midas", "depth", build_midas_depth, MIDAS_WEIGHTS, max_pixels=MEGAPIXEL)
NORMAL_MIDAS = define_network("normal_midas", "normal", build_midas_normals, MIDAS_WEIGHTS, max_pixels=MEGAPIXEL)
DEPTH_ANYTHING_V2 = define_network(
    "depth_anything_v2",
    "depth",
    build_depth_anything,
    PublishedWeights(
        file="depth-anything-v2-small.safetensors",
        sha256="3152477ce0d8d6978d76b995120de97cb5b928701fd0f817769f59e249a16b70",
        source=HubFile(
            repository="depth-anything/Depth-Anything-V2-Small-hf",
            revision="5426e4f0f36572d16453bbda7a8389317b1bef99",
            path="model.safetensors",
        ),
        licence="Apache-2.0",
    ),
    max_pixels=8 * MEGAPIXEL,  # the network itself always sees about 518 x 518
)
