"""Where an imported model comes from and under which licences: what a registry says of it."""

from typing import Any

from prompt_diffusion.model.original.parts import ImportReport
from prompt_diffusion.model.references import BASE_LICENCES, SD_V1_5
from prompt_diffusion.vision_tasks import VISION_TASKS

RELEASED_NAME = "network-step=04999.ckpt"
"""The file that the paper's authors released; no digest of it could be confirmed, so its name and sizes identify it."""
_RELEASED_PARAMETERS = {"unet": 859_520_964, "controlnet": 362_366_032}
_RELEASED_FACTS: dict[str, Any] = {
    "title": "Prompt Diffusion, the released weights",
    "base": SD_V1_5,
    "vision_tasks": tuple(VISION_TASKS),
    "licences": {
        "base": BASE_LICENCES[SD_V1_5],
        "code": "Apache-2.0",
        "text encoder": "MIT",
        "released weights": "as the place that they were fetched from states",
    },
}
_RELEASED_NOTES = (
    "Taken for the weights that the authors of arXiv 2305.01115 released (step 4999, InstructPix2Pix at 256 pixels), by the "
    "file's name and its sizes. They go on from Stable Diffusion v1.5: the restrictions of use of its licence hold for them, "
    "too. The licence of the code is that of the authors' repository."
)
_OTHER_NOTES = (
    "Weights of the layout that the code of arXiv 2305.01115 writes; what they were trained on is not known here."
)
_USE_NOTES = (
    "Conditions are images in [-1, 1]. Unless told otherwise it samples as published: DDIM, 100 steps, guidance 9."
)


def describe_origin(report: ImportReport) -> dict[str, Any]:
    """Return the facts about an imported model, by the fields of the registry's ``ModelFacts``."""
    facts = {
        "title": f"Prompt Diffusion, imported from {report.source}",
        "source": f"{report.source}, sha256 {report.sha256}",
        "configuration": {"architecture": report.architecture, "image_size": report.image_size},
        "licences": {"base": "unknown", "released weights": "unknown"},
        "notes": f"{_OTHER_NOTES} {_USE_NOTES}",
    }
    return facts | _RELEASED_FACTS | {"notes": f"{_RELEASED_NOTES} {_USE_NOTES}"} if is_released(report) else facts


def is_released(report: ImportReport) -> bool:
    """Say whether an import is taken for the released weights."""
    sizes = {part: report.parts.get(part, {}).get("parameters") for part in _RELEASED_PARAMETERS}
    return report.source == RELEASED_NAME and sizes == _RELEASED_PARAMETERS
