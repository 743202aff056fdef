"""Semantic segmentation in the colours of ADE20K's 150 classes; this module stays light, torch comes with the build.

The published maps were made by UniFormer, which no maintained package has; UperNet, its decoder, stands on ConvNeXt here.
Source of the pre- and post-processing: transformers' image processors, which batch on the device. UperNet's file is pinned
by the hub's commit: its sha256 could not be confirmed when it was added.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_diffusion.annotators.ade20k import PALETTE
from prompt_diffusion.annotators.base import MEGAPIXEL
from prompt_diffusion.annotators.network_spec import Infer, define_network
from prompt_diffusion.annotators.weights import Arrays, HubFile, PublishedWeights

if TYPE_CHECKING:
    from torch import Tensor

NUM_CLASSES = len(PALETTE)
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
# CLIP's tokens of "the task is semantic", padded with zeros as OneFormer's processor pads them.
_TASK_TOKENS = [49406, 518, 10549, 533, 29119, 1550, 49407] + 70 * [0]


def build_upernet(arrays: Arrays, name: str, device: str) -> Infer:
    """Return segmentations by UperNet on ConvNeXt-small (82 M parameters), inferred at 512 x 512."""
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    from prompt_diffusion.annotators.networks import load_transformer

    backbone = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[96, 192, 384, 768], out_features=_STAGES)
    config = UperNetConfig(backbone_config=backbone, auxiliary_in_channels=384, num_labels=NUM_CLASSES)
    return wrap_upernet(load_transformer(UperNetForSemanticSegmentation, config, arrays, name).to(device), 512)


def wrap_upernet(network: Any, size: int) -> Infer:  # noqa: ANN401 - a model of transformers
    """Put transformers' processor around a network: bilinear to (size, size), scores back bilinearly, then the classes."""
    from transformers import SegformerImageProcessor

    processor = SegformerImageProcessor(size={"height": size, "width": size})

    def infer(images: "Tensor") -> "Tensor":
        inputs = processor(images=list(images.contiguous()), device=images.device, return_tensors="pt")
        return _paint(processor, network(**inputs), images)

    return infer


def build_oneformer(arrays: Arrays, name: str, device: str) -> Infer:
    """Return segmentations by OneFormer on Swin-large (219 M parameters), inferred at 640 px on the shorter side."""
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

    from prompt_diffusion.annotators.networks import load_transformer

    backbone = SwinConfig(
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.3,
        out_features=_STAGES,
    )
    queries = arrays.get("model.transformer_module.queries_embedder.weight")
    if queries is None:
        raise ValueError(f"weights {name} do not fit OneFormer: they have no object queries")
    config = OneFormerConfig(backbone_config=backbone, num_labels=NUM_CLASSES, num_queries=len(queries))
    network = load_transformer(OneFormerForUniversalSegmentation, config, arrays, name)
    return wrap_oneformer(network.to(device), {"shortest_edge": 640, "longest_edge": 2560})


def wrap_oneformer(network: Any, size: dict[str, int]) -> Infer:  # noqa: ANN401 - a model of transformers
    """Put transformers' processor around a network that is asked for the semantic task."""
    import torch
    from transformers import OneFormerImageProcessor

    processor = OneFormerImageProcessor(size=size)

    def infer(images: "Tensor") -> "Tensor":
        tasks = ["semantic"] * len(images)
        inputs = processor(
            images=list(images.contiguous()), task_inputs=tasks, device=images.device, return_tensors="pt"
        )
        tokens = torch.tensor([_TASK_TOKENS], device=images.device).expand(len(images), -1)
        outputs = network(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"], task_inputs=tokens)
        return _paint(processor, outputs, images)

    return infer


def _paint(processor: Any, outputs: Any, images: "Tensor") -> "Tensor":  # noqa: ANN401 - transformers' own
    """Return the classes' colours N,H,W,3 at the images' own size."""
    import torch

    sizes = [tuple(images.shape[2:])] * len(images)
    classes = torch.stack(processor.post_process_semantic_segmentation(outputs, target_sizes=sizes))
    return torch.from_numpy(np.array(PALETTE, np.uint8)).to(images.device)[classes]


SEG_UPERNET = define_network(
    "seg_upernet",
    "seg",
    build_upernet,
    PublishedWeights(
        file="upernet-convnext-small.bin",
        sha256=None,
        source=HubFile(
            repository="openmmlab/upernet-convnext-small",
            revision="550b68d291f9a7e4874065c6eec0676b2ba821e6",
            path="pytorch_model.bin",
        ),
        licence="MIT",
    ),
    max_pixels=2 * MEGAPIXEL,  # the scores of 150 classes come back at the image's own size
)
SEG_ONEFORMER = define_network(
    "seg_oneformer",
    "seg",
    build_oneformer,
    PublishedWeights(
        file="oneformer-ade20k-swin-large.bin",
        sha256="c0b2fe11dfecee6f2f1f315f466946e96f4e94813f3f6d660ff3747b83c28cc9",
        source=HubFile(
            repository="shi-labs/oneformer_ade20k_swin_large",
            revision="4a5bac8e64f82681a12db2e151a4c2f4ce6092b2",
            path="pytorch_model.bin",
        ),
        licence="MIT",
    ),
    max_pixels=2 * MEGAPIXEL,  # the scores of 150 classes come back at the image's own size
)
