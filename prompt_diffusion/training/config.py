"""What a training is: the recipe (scientific: it moves the fingerprint) and the resources (which never do)."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prompt_diffusion.vision_tasks import VISION_TASKS, ExamplePolicy, find_vision_task

Fraction = float


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class OptimizerConfig(_Frozen):
    """Optimizer and learning-rate schedule; the defaults are the published ones (AdamW 1e-4, constant)."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW as published, or Muon for matrices with AdamW for the rest."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW's rate."""
    muon_learning_rate: float = Field(default=0.015, gt=0)
    """Muon's rate (unused by AdamW)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay rate."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second decay rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate climbs to its base value."""
    flat_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps at the base rate; then it falls linearly. 1 keeps it constant, as published."""
    final_factor: float = Field(default=1.0, ge=0, le=1)
    """The rate at the last step, as a share of the base rate."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient over all parameters; None leaves it alone, as published."""
    skip_norm: float | None = Field(default=None, gt=0)
    """Norm of the gradient above which a step is skipped and counted; None skips only what is not finite."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the average of the weights that is kept beside them and becomes the model; None keeps none, as published."""


class NoiseConfig(_Frozen):
    """What the network predicts and which timesteps it is shown; the base's own scheduler must agree."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Noise, as published, or v (Salimans and Ho, 2022)."""
    late_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose timestep is drawn from the noisiest ``late_timesteps`` alone."""
    late_timesteps: int = Field(default=150, ge=1, le=1000)
    """How many of the noisiest timesteps that share is drawn from."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weight a sample's loss by min(SNR, gamma) (Hang et al., arXiv 2303.09556); None weighs all alike, as published."""


class DropoutConfig(_Frozen):
    """One uniform number u a sample empties the text (u < text) and greys the pair (overlapping it by ``overlap``).

    Published: text 0.10, example pair 0.10, overlap 0.05: u < 0.10 empties the text, 0.05 <= u < 0.15 zeroes the pair.
    """

    text_map_to_image: Fraction = Field(default=0.10, ge=0, le=1)
    """Share of the map-to-image samples without text."""
    text_image_to_map: Fraction = Field(default=0.10, ge=0, le=1)
    """Share of the image-to-map samples without text."""
    example_pair: Fraction = Field(default=0.10, ge=0, le=1)
    """Share of the samples whose example pair is mid-grey."""
    overlap: Fraction = Field(default=0.05, ge=0, le=1)
    """Share of the samples that lose both."""


class SamplingConfig(_Frozen):
    """How pictures are made with the model: in its validation grid, and where a call of its pipeline does not say."""

    num_inference_steps: int = Field(default=50, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=1.0)
    """Guidance weight; 1 is no guidance. The grid's image-to-map rows have none."""


class TrainConfig(_Frozen):
    """The recipe of one training; the defaults are the published facts (see ``presets.paper`` for their sources)."""

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Base model: ``demo-base``, a folder in diffusers' layout, a hub's repository (``name`` or ``name@revision``), or a
    registered model (``models:/name/3``; an alias may point to another model when the run is repeated)."""
    controlnet: str | None = None
    """ControlNet to start from: None copies the UNet's encoder, as published; ``base`` takes the one that stands beside the
    base (a model trained here, to go on with); else a folder or a hub's repository of a diffusers ControlNetModel, whose
    trunk and query stem are taken. The example stem is new where there is none."""
    method: Literal["prompt_diffusion", "controlnet"] = "prompt_diffusion"
    """Prompt Diffusion, or the task-specific baseline CN(FT): the same loop with the query alone."""
    vision_tasks: tuple[str, ...] = tuple(VISION_TASKS)
    """Vision tasks, drawn uniformly."""
    image_to_map_examples: dict[ExamplePolicy, float] = {"same_group": 1.0}
    """Where the example pair of an image-to-map sample comes from: policies with their shares."""
    map_to_image_examples: dict[ExamplePolicy, float] = {"same_group": 1.0}
    """Where the example pair of a map-to-image sample comes from: policies with their shares."""
    dropout: DropoutConfig = DropoutConfig()
    """How often text and example pair are dropped."""
    noise: NoiseConfig = NoiseConfig()
    """What is predicted, at which timesteps."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    stem_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Channels of the stems; each step after the first halves the size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in, by autocast; weights, optimizer and loss stay float32, as published throughout."""
    train_decoder: bool = True
    """Train the UNet's decoder beside the ControlNet, as published (the flag that should lock it is inverted)."""
    sampling: SamplingConfig = SamplingConfig()
    """How pictures are made with the model; saved with it."""
    batch_size: int = Field(default=512, ge=1)
    """Samples a step in all, over every process and micro-batch."""
    num_steps: int = Field(default=5000, ge=1)
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
        return self


class TrainResources(_Frozen):
    """How a training runs here: never part of the fingerprint."""

    engine: Literal["local", "ray"] = "local"
    """Where its processes run: children of this one (torchrun for several), or Ray Train's workers on many machines."""
    ray_address: str | None = None
    """A running Ray cluster, as Ray names it; None starts one on this machine."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that share each step's batch: one a GPU."""
    threads_per_process: int = Field(default=1, ge=1)
    """CPU threads of each process; 1 on a shared machine, where spinning threads cost far more than they give."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    time_limit_seconds: float | None = Field(default=None, gt=0)
    """Time after which the training is asked to save and stop, as by SIGTERM; the same run goes on later."""
    device_batch_size: int | None = Field(default=None, ge=1)
    """Samples a process holds at once; the batch is accumulated over as many passes as it takes. None finds it by trial: all
    of the process's share, halved as long as the device's memory does not suffice."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """Compile the networks with torch.compile: a minute or more at the start."""
    loader_threads: int = Field(default=2, ge=1)
    """Threads a process that fetch shards and prepare samples ahead of the device."""
    cache_dir: Path | None = None
    """Folder of the local shard cache, best on a fast disk; None takes PROMPT_DIFFUSION_CACHE_DIR's."""
    cache_bytes: int | None = Field(default=None, gt=0)
    """Most bytes that the shard cache may take: the least recently used shards go first. None sets no limit."""
    checkpoint_every_seconds: float = Field(default=60.0, gt=0)
    """Time between checkpoints."""
    spaced_checkpoints: int = Field(default=3, ge=0)
    """Checkpoints that are kept beside the last two and the best, evenly spaced over the steps."""
    validate_every_steps: int | None = Field(default=500, ge=1)
    """Steps between two validations: a loss over fixed validation samples and a grid of pictures. None makes none."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between points sent to the tracker and the terminal."""
