"""What configures any training: optimizer and noise (scientific: they enter the fingerprint) and resources (which never do)."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from prompt_diffusion.device import AUTO
from prompt_diffusion.frozen import FrozenModel


class OptimizerConfig(FrozenModel):
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
    """Norm of the gradient above which a step is skipped and counted; None skips only steps that are not finite."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the weights' exponential moving average (EMA), which then becomes the model; None keeps none, as published."""


class NoiseConfig(FrozenModel):
    """What the network predicts and which timesteps it is shown; the base's own scheduler must agree."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Noise, as published, or v (Salimans and Ho, 2022)."""
    late_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose timestep is drawn from the noisiest ``late_timesteps`` alone."""
    late_timesteps: int = Field(default=150, ge=1, le=1000)
    """How many of the noisiest timesteps that share is drawn from."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weight a sample's loss by min(SNR, gamma) (Hang et al., arXiv 2303.09556); None weights all alike, as published."""


class TrainResources(FrozenModel):
    """How a training runs here: never part of the fingerprint."""

    engine: Literal["local", "ray"] = "local"
    """Where its processes run: children of this one (torchrun for several), or Ray Train's workers on many machines."""
    ray_address: str | None = None
    """A running Ray cluster, as Ray names it; None starts one on this machine."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that share each step's batch: one per GPU."""
    threads_per_process: int = Field(default=1, ge=1)
    """CPU threads of each process; 1 on a shared machine, where spinning threads cost more than they gain."""
    device: str = AUTO
    """Where to compute: ``cpu``, ``cuda`` (a GPU for each process), ``cuda:1``; ``auto`` takes GPUs where there are some."""
    time_limit_seconds: float | None = Field(default=None, gt=0)
    """Time after which the training saves a checkpoint and stops, as after SIGTERM; the same run resumes later."""
    device_batch_size: int | None = Field(default=None, ge=1)
    """Samples of a micro-batch: a process accumulates gradients over as many as its share of the batch takes. None finds the
    size by trial: the whole share, halved for as long as the device is out of memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """Compile the networks with torch.compile, which takes a minute or more at the start."""
    loader_threads: int = Field(default=2, ge=1)
    """Threads of each process that fetch shards and prepare samples ahead of the device."""
    cache_dir: Path | None = None
    """Folder of the local shard cache, best on a fast disk; None takes PROMPT_DIFFUSION_CACHE_DIR's."""
    cache_bytes: int | None = Field(default=None, gt=0)
    """Limit of the shard cache: the least recently used shards are deleted first. None sets no limit."""
    checkpoint_every_seconds: float = Field(default=60.0, gt=0)
    """Time between checkpoints."""
    spaced_checkpoints: int = Field(default=3, ge=0)
    """Checkpoints kept besides the last two and the best, evenly spaced over the steps."""
    validate_every_steps: int | None = Field(default=500, ge=1)
    """Steps between two validations: a loss over fixed validation samples and a grid of images. None turns them off."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between points sent to the tracker and the terminal."""
    profile_steps: int | None = Field(default=None, ge=1)
    """Steps to record with torch.profiler, after the first two; the trace is written beside the checkpoints."""
