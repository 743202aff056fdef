"""What is known of a model beside its weights."""

from typing import Any

from pydantic import Field

from prompt_diffusion.frozen import FrozenModel

UNKNOWN = "unknown"


class ModelFacts(FrozenModel):
    """What a version says of its model, and what the model card is rendered from."""

    title: str = Field(min_length=1)
    """What the model is, in a few words."""
    source: str = UNKNOWN
    """Where its weights came from: a training of ours, a checkpoint's name and digest, an address."""
    base: str = UNKNOWN
    """The model that it was trained from."""
    vision_tasks: tuple[str, ...] = ()
    """The vision tasks that it was trained on; none where that is not known."""
    licences: dict[str, str] = {}
    """Licence by part: ``base``, ``dataset``, ``code``, ``annotator depth_midas``; "unknown" where it is not known."""
    configuration: dict[str, Any] = {}
    """The recipe, as JSON values; nothing where it is not known."""
    datasets: dict[str, str] = {}
    """What it was trained on: fingerprint or digest by role; nothing where it is not known."""
    dataset_notes: dict[str, str] = {}
    """What those are, by the same roles: where images come from and how many, what made maps."""
    limits: tuple[str, ...] = ()
    """What it cannot do, one sentence each."""
    notes: str = ""
    """Anything else that a reader of the model card must know, in Markdown."""
