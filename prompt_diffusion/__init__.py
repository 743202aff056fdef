"""Prompt Diffusion, from raw dataset to results table: a library that knows no orchestrator.

``load`` gives a working pipeline for a registered model or a folder; ``dir(prompt_diffusion)`` lists what else there is. Each
name is imported when it is first used, so that importing the package is fast and loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_diffusion.annotators.table import build_annotator
    from prompt_diffusion.evaluation.table import read_table
    from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
    from prompt_diffusion.model.outputs import EditingOutput, PromptDiffusionOutput
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
    from prompt_diffusion.presets import build_preset
    from prompt_diffusion.registry import fetch, list_versions, load, register_folder, set_alias
    from prompt_diffusion.settings import Settings, load_settings
    from prompt_diffusion.store.manifest import open_manifest
    from prompt_diffusion.vision_tasks import find_vision_task

__version__ = "0.1.0"

__all__ = [
    "EditingOutput",
    "PromptDiffusionControlNet",
    "PromptDiffusionOutput",
    "PromptDiffusionPipeline",
    "Settings",
    "build_annotator",
    "build_preset",
    "fetch",
    "find_vision_task",
    "list_versions",
    "load",
    "load_settings",
    "open_manifest",
    "read_table",
    "register_folder",
    "set_alias",
]

_HOMES = {
    "EditingOutput": "prompt_diffusion.model.outputs",
    "PromptDiffusionControlNet": "prompt_diffusion.model.controlnet",
    "PromptDiffusionOutput": "prompt_diffusion.model.outputs",
    "PromptDiffusionPipeline": "prompt_diffusion.model.pipeline",
    "Settings": "prompt_diffusion.settings",
    "build_annotator": "prompt_diffusion.annotators.table",
    "build_preset": "prompt_diffusion.presets",
    "fetch": "prompt_diffusion.registry",
    "find_vision_task": "prompt_diffusion.vision_tasks",
    "list_versions": "prompt_diffusion.registry",
    "load": "prompt_diffusion.registry",
    "load_settings": "prompt_diffusion.settings",
    "open_manifest": "prompt_diffusion.store.manifest",
    "read_table": "prompt_diffusion.evaluation.table",
    "register_folder": "prompt_diffusion.registry",
    "set_alias": "prompt_diffusion.registry",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - lazy, so that importing the package loads no torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
