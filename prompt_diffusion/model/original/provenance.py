"""Where an imported model comes from and under which licences: what a registry says of it."""

from typing import Any

from prompt_diffusion.model.original.parts import ImportReport

PAPER = "arXiv 2305.01115"
LICENCES = {
    "code of the paper's authors": "Apache-2.0 (Zhendong-Wang/Prompt-Diffusion)",
    "base": "CreativeML OpenRAIL-M (Stable Diffusion v1.5), whose restrictions of use hold for what was trained from it",
    "text encoder": "MIT (OpenAI's CLIP ViT-L/14)",
    "released weights": "as the place that they were fetched from states it: read it there",
}
"""Facts about the released weights; of weights that only share their layout, the user knows more than this table."""


def describe_origin(report: ImportReport) -> dict[str, Any]:
    """Return the facts about an imported model, by the fields of the registry's ``ModelFacts``."""
    return {
        "title": f"Prompt Diffusion, imported from {report.source}",
        "source": f"{report.source}, sha256 {report.sha256}",
        "base": "Stable Diffusion v1.5 where these are the released weights",
        "licences": LICENCES,
        "configuration": {"architecture": report.architecture, "image_size": report.image_size},
        "notes": (
            f"Weights of the layout that {PAPER} released; not trained here. Conditions are images in [-1, 1]; published "
            "evaluation: DDIM, 100 steps, guidance 9. The licences are those of the released weights."
        ),
    }
