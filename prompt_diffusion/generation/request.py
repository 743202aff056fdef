"""What is asked for: the settings of one image."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from prompt_diffusion.frozen import FrozenModel, say_first_error

Mode = Literal["generate", "edit"]
Scheduler = Literal["ddim", "dpm", "unipc"]


class GenerationRequest(FrozenModel):
    """What is asked for, beside the images; None takes the model's own value."""

    model: str = Field(min_length=1)
    """``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a folder, or a hub's repository."""
    mode: Mode = "generate"
    """``generate`` does to the query what the example pairs show; ``edit`` goes from the query to its map, and from that to a
    new image."""
    prompt: str = Field(default="", max_length=2000)
    """Text; "" lets the example pairs decide alone."""
    negative_prompt: str = Field(default="", max_length=2000)
    """What guidance leads away from."""
    condition: str | None = None
    """The map between the two images of an edit."""
    seed: int = Field(default=0, ge=0, lt=2**53)
    """Seed of the image; below 2**53, so that every reader of JSON reads the same number."""
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps; an edit takes them twice."""
    guidance_scale: float | None = Field(default=None, ge=0.0, le=100.0)
    """Guidance weight; 1 or less is none."""
    controlnet_conditioning_scale: float = Field(default=1.0, ge=0.0, le=10.0)
    """Weight of the example pairs and the query."""
    scheduler: Scheduler | None = None
    """Which solver takes the steps."""
    size: int | None = Field(default=None, ge=8, le=4096)
    """Pixels a side of the result; images are cut to their centre square and resized to it."""

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "edit" and not self.prompt.strip():
            raise ValueError("an edit needs a prompt, the text that says what the new image shows")
        if (self.mode == "edit") != (self.condition is not None):
            raise ValueError("a condition belongs to mode 'edit', which needs one")
        return self


def build_request(fields: Mapping[str, Any]) -> GenerationRequest:
    """Return the request; ValueError, in one sentence, names the field, what is allowed and what was given."""
    try:
        return GenerationRequest.model_validate(dict(fields))
    except ValidationError as error:
        raise ValueError(say_first_error(error)) from None
