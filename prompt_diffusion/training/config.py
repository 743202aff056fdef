"""The recipe of an in-context training: every field is scientific and enters the fingerprint."""

from typing import Literal, Self

from pydantic import Field, model_validator

from prompt_diffusion.data.augmentation import find_augmentation
from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.vision_tasks import VISION_TASKS, Draw, ExamplePolicy, find_vision_task


class DropoutConfig(FrozenModel):
    """One uniform number u per sample decides whether its text is emptied and whether its example pair becomes mid-grey.

    Published: text 0.10, example pair 0.10, overlap 0.05: u < 0.10 empties the text, 0.05 <= u < 0.15 zeroes the pair.
    """

    text_map_to_image: float = Field(default=0.10, ge=0, le=1)
    """Share of the map-to-image samples without text."""
    text_image_to_map: float = Field(default=0.10, ge=0, le=1)
    """Share of the image-to-map samples without text."""
    example_pair: float = Field(default=0.10, ge=0, le=1)
    """Share of the samples whose example pair is mid-grey."""
    overlap: float = Field(default=0.05, ge=0, le=1)
    """Share of the samples that lose both."""


class SamplingConfig(FrozenModel):
    """How images are generated with the model: in the validation grid, and by its pipeline unless a call says otherwise."""

    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=1.0)
    """Guidance weight; 1 is no guidance, which the grid's image-to-map rows always have."""


class TrainConfig(FrozenModel):
    """The recipe of one training; the defaults are the published facts (see ``presets.paper`` for their
    sources), except for ``draw`` and ``sampling``."""

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Base model: ``demo-base``, a folder in diffusers' layout, a hub's repository (``name`` or ``name@revision``), or a
    registered model (``models:/name/3``; an alias may point to another model when the run is repeated)."""
    controlnet: str | None = None
    """ControlNet to start from: None copies the UNet's encoder, as published; ``base`` takes the one beside the base (to
    continue a model trained here); else a folder or a hub's repository of a diffusers ControlNetModel, whose trunk and query
    stem are taken. The example stem is new where there is none."""
    method: Literal["prompt_diffusion", "controlnet"] = "prompt_diffusion"
    """Prompt Diffusion, or the task-specific baseline CN(FT): the same loop with the query alone."""
    vision_tasks: tuple[str, ...] = tuple(VISION_TASKS)
    """Vision tasks, drawn uniformly."""
    draw: Draw = "row"
    """What an epoch visits once: every row, or every prompt group by one of its rows, drawn anew each epoch (as published);
    by row, a group of four pairs counts four times a group of one."""
    image_to_map_examples: dict[ExamplePolicy, float] = {"same_group": 1.0}
    """Where the example pair of an image-to-map sample comes from: policies and their shares."""
    map_to_image_examples: dict[ExamplePolicy, float] = {"same_group": 1.0}
    """Where the example pair of a map-to-image sample comes from: policies and their shares."""
    augmentation: dict[str, float] = {}
    """Shares of the samples that show a random target function in place of a vision task's map, by its family
    (``data.augmentation``); what is left of 1 are the vision tasks as they are. Published: none."""
    dropout: DropoutConfig = DropoutConfig()
    """How often text and example pair are dropped."""
    noise: NoiseConfig = NoiseConfig()
    """What is predicted, and at which timesteps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    stem_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Channels of the stems; each step after the first halves the size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in, by autocast; weights, optimizer and loss stay float32. Published: float32 throughout."""
    train_decoder: bool = True
    """Train the UNet's decoder, too, as published (in its code the flag that should lock the decoder is inverted)."""
    sampling: SamplingConfig = SamplingConfig()
    """How images are generated with the model; saved with it."""
    batch_size: int = Field(default=512, ge=1, le=1_000_000)
    """Samples per step, over all processes and micro-batches."""
    num_steps: int = Field(default=5000, ge=1, le=1_000_000_000)
    """Optimizer steps."""
    seed: int = 0
    """Seed of the sample order, the noise and the new weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.vision_tasks:
            find_vision_task(name)
        if not self.vision_tasks:
            raise ValueError("vision_tasks is empty: name at least one")
        if self.method == "controlnet" and len(self.vision_tasks) != 1:
            raise ValueError(
                f"a controlnet baseline knows its vision task by training on it alone: got {len(self.vision_tasks)}"
            )
        for field in ("image_to_map_examples", "map_to_image_examples"):
            total = sum(getattr(self, field).values())
            if abs(total - 1.0) > 1e-6:
                raise ValueError(f"{field}: shares must sum to 1, they sum to {total}")
        self._check_augmentation()
        return self

    def _check_augmentation(self) -> None:
        if self.augmentation and self.method == "controlnet":
            raise ValueError(
                "augmentation is nothing for a controlnet baseline: without an example pair it cannot be known"
            )
        conditions = {find_vision_task(name).condition for name in self.vision_tasks}
        for family, share in self.augmentation.items():
            missing = sorted(find_augmentation(family).conditions - conditions)
            if missing:
                raise ValueError(
                    f"augmentation {family!r} reads maps of {', '.join(missing)}, which no vision task of the recipe has"
                )
            if share <= 0.0:
                raise ValueError(f"augmentation: the share of {family!r} must be above 0, it is {share}")
        if sum(self.augmentation.values()) > 1.0 + 1e-6:
            raise ValueError(
                f"augmentation: shares must sum to 1 or less, they sum to {sum(self.augmentation.values())}"
            )
