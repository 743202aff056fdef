"""Which condition map is made, and by what: the stage's scientific configuration."""

from typing import Literal, Self

from pydantic import Field, model_validator

from prompt_diffusion.annotators.table import find_annotator
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.vision_tasks import CONDITION_PATTERN

EXACT = "exact"
EXACT_VERSION = 1


class AnnotateConfig(FrozenModel):
    """Which condition map is made, and by what."""

    condition: str = Field(pattern=CONDITION_PATTERN)
    """The kind of map: an annotator's, or with ``exact`` any that the pairs bring."""
    annotator: str = EXACT
    """A name in the table of annotators, or ``exact``: the maps that the pairs bring with them."""
    resolution: Literal["training", "native"] = "training"
    """What an annotator sees: the pairs as ingested, or the source's own pixels, as published, its map resized once."""
    weights_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The sha256 of other weights for the same network; None demands the published ones."""

    @model_validator(mode="after")
    def _check_annotator(self) -> Self:
        if self.annotator == EXACT:
            if self.weights_sha256 is not None:
                raise ValueError(
                    f"annotator 'exact' has no weights, so weights_sha256 {self.weights_sha256} fits nothing"
                )
            if self.resolution == "native":
                raise ValueError("annotator 'exact' copies maps at resolution 'training', not 'native'")
            return self
        spec = find_annotator(self.annotator)
        if spec.condition != self.condition:
            raise ValueError(f"annotator {self.annotator!r} makes {spec.condition} maps, not {self.condition} maps")
        spec.choose_digest(self.weights_sha256)
        return self
