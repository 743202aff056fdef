"""Complete configurations: ``smoke`` (seconds, for tests), ``demo`` (minutes, a laptop), ``paper`` (the published numbers).

A run is a preset plus overrides, validated before anything starts.
"""

from prompt_diffusion.presets.build import build_preset
from prompt_diffusion.presets.config import PRESET_NAMES, FanOut, PresetName, RunConfig
from prompt_diffusion.presets.published import paper
from prompt_diffusion.presets.small import demo, smoke

__all__ = [
    "PRESET_NAMES",
    "FanOut",
    "PresetName",
    "RunConfig",
    "build_preset",
    "demo",
    "paper",
    "smoke",
]
