"""What the look-up's own training is: supervised, without diffusion, before it enters a ControlNet."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from prompt_diffusion.data.sources.scene_renderer import PALETTE
from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.frozen import FrozenModel

Color = tuple[int, int, int]


class LookUpArchitecture(FrozenModel):
    """The arguments of a LookUp."""

    channels: tuple[int, ...] = (24, 48, 64)
    """Channels of E and V by level; each level after the first halves the size."""
    patch_size: int = Field(default=2, ge=1)
    """Pixels along a side that the first level gathers."""
    context_channels: int = Field(default=96, ge=1)
    """Channels of the branch of half the last level's size, which sees the whole picture."""
    decoder_channels: tuple[int, ...] = (24, 48, 80)
    """Channels of the decoder by level."""
    num_heads: int = Field(default=4, ge=1)
    """Heads of the matching."""
    norm_groups: int = Field(default=8, ge=1)
    """Groups of every normalisation."""
    has_decoder: bool = True
    """Whether it draws a draft."""


class LookUpConfig(FrozenModel):
    """Architecture and recipe of a look-up."""

    architecture: LookUpArchitecture = LookUpArchitecture()
    """The networks."""
    shares: dict[str, float] = {
        "seg_palette": 0.35,
        "depth_ramp": 0.2,
        "hed_style": 0.12,
        "image_recolored": 0.25,
        "depth": 0.04,
        "hed": 0.02,
        "seg": 0.02,
    }
    """How often each kind of target is drawn: members of families, and maps as they are; shares sum to 1."""
    num_members: int = Field(default=2, ge=1)
    """Members of its family that a pair of scenes is shown with: E and the matching are computed once for all of them."""
    class_colors: tuple[Color, ...] = tuple((int(r), int(g), int(b)) for r, g, b in PALETTE)
    """The colour of each class in the segmentation maps."""
    num_background_classes: int = Field(default=2, ge=0)
    """The first of them (sky and floor); the rest are objects."""
    object_weight: float = Field(default=3.0, gt=0)
    """How many times a pixel of the background an object's pixel counts."""
    agreeing_fraction: float = Field(default=0.8, ge=0, le=1)
    """Share of the samples whose two scenes are chosen for showing the same classes."""
    num_candidates: int = Field(default=8, ge=1)
    """Scenes among which the one that agrees best is chosen."""
    mirrored_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of the scenes that are shown mirrored."""
    auxiliary_fraction: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps, at the beginning, in which E alone is trained, on its auxiliary targets; they are kept afterwards."""
    auxiliary_weight: float = Field(default=1.0, ge=0)
    """Weight of E's auxiliary targets (classes, depth, edges, colours) beside the draft; 0 does without."""
    optimizer: OptimizerConfig = OptimizerConfig(
        name="muon",
        learning_rate=2e-3,
        muon_learning_rate=0.02,
        weight_decay=0.0,
        warmup_steps=30,
        flat_fraction=0.5,
        final_factor=0.03,
        clip_norm=1.0,
    )
    """Optimizer and schedule."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs of scenes a step; each serves in both directions."""
    num_steps: int = Field(default=3000, ge=1)
    """Optimizer steps."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in, by autocast; weights, matching, colour fits and loss stay float32."""
    seed: int = 0
    """Seed of weights, samples and order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(sum(self.shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"shares must sum to 1, they sum to {sum(self.shares.values())}")
        if not self.architecture.has_decoder:
            raise ValueError("architecture.has_decoder is false: the draft is what a look-up is trained with")
        return self

    @property
    def num_auxiliary_steps(self) -> int:
        """Steps in which E alone is trained."""
        return int(self.num_steps * self.auxiliary_fraction) if self.auxiliary_weight else 0

    def list_architecture(self) -> dict[str, Any]:
        """Return the arguments of the network."""
        return self.architecture.model_dump()
