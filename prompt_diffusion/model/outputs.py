"""What the pipeline's calls return."""

from typing import Any

from diffusers.utils import BaseOutput


class PromptDiffusionOutput(BaseOutput):  # type: ignore[misc]
    """What a call returns."""

    images: Any
    """PIL images (``pil``), float arrays N, H, W, 3 in [0, 1] (``np``), tensors N, 3, H, W in [0, 1] (``pt``), uint8 arrays
    (``uint8``), or latents (``latent``)."""


class EditingOutput(BaseOutput):  # type: ignore[misc]
    """What an edit by text returns."""

    images: Any
    """The edited pictures."""
    maps: Any
    """The condition maps in between, one for each given picture; uint8 arrays where the pictures are latents."""
