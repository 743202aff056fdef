"""Prompt Diffusion, from raw dataset to results table: a library that knows no orchestrator.

``load`` gives a working pipeline for a registered model or a folder.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
    from prompt_diffusion.registry import load

__all__ = ["PromptDiffusionControlNet", "PromptDiffusionPipeline", "load"]

_HOMES = {
    "PromptDiffusionControlNet": "prompt_diffusion.model.controlnet",
    "PromptDiffusionPipeline": "prompt_diffusion.model.pipeline",
    "load": "prompt_diffusion.registry",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - lazy, so that importing the package loads no torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
