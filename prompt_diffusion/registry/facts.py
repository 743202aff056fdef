"""What is known about a model besides its weights."""

from typing import Any

from pydantic import Field

from prompt_diffusion.frozen import FrozenModel

UNKNOWN = "unknown"


class ModelFacts(FrozenModel):
    """What a version records about its model, from which the model card is rendered."""

    title: str = Field(min_length=1)
    """What the model is, in a few words."""
    source: str = UNKNOWN
    """Where its weights came from: a training of ours, a checkpoint's name and digest, an address."""
    base: str = UNKNOWN
    """The model that it was trained from."""
    vision_tasks: tuple[str, ...] = ()
    """The vision tasks that it was trained on; empty if not known."""
    licences: dict[str, str] = {}
    """Licence by part: ``base``, ``dataset``, ``code``, ``annotator depth_midas``; "unknown" if not known."""
    configuration: dict[str, Any] = {}
    """The recipe, as JSON values; empty if not known."""
    datasets: dict[str, str] = {}
    """What it was trained on: fingerprint or digest by role; empty if not known."""
    dataset_notes: dict[str, str] = {}
    """Descriptions by the same roles: where images come from and how many, what made the maps."""
    limits: tuple[str, ...] = ()
    """What it cannot do, one sentence each."""
    notes: str = ""
    """Anything else that readers of the model card must know, in Markdown."""
