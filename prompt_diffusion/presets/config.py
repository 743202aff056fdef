"""A complete configuration: what the stages need, what the baselines change, and how much of the machine each stage takes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.ingest import IngestConfig
from prompt_diffusion.engine.config import OptimizerConfig, TrainResources
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import EncodeConfig, EncodeResources

PresetName = Literal["smoke", "demo", "paper"]
PRESET_NAMES: tuple[PresetName, ...] = ("smoke", "demo", "paper")


class BaselinesConfig(FrozenModel):
    """The CN(FT) baselines: the joint recipe with the query alone, one vision task each.

    The optimizer is their own, so that tuning the joint training's does not retrain the baselines.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per step. The number of steps follows: as many samples of its vision task as the joint model saw of it."""
    controlnets: dict[str, str] = {}
    """ControlNet that the baseline of a vision task starts from, a folder or a hub's repository, such as
    ``{"depth_to_image": "lllyasviel/sd-controlnet-depth"}``; the others start from the base's encoder."""


class FanOut(FrozenModel):
    """How the shards of a large stage are shared among workers: never part of a fingerprint."""

    engine: Literal["threads", "ray"] = "threads"
    """Threads of this process, one per device, or a Ray cluster (the extra 'ray')."""
    devices: tuple[str, ...] = ()
    """The devices of one process, in place of the stage's own; with threads, as many parts run at once as there are."""
    shards_per_part: int = Field(default=32, ge=1)
    """Shards per task. Parts are large: a task's overhead and the loading of weights must not matter."""
    ray_address: str | None = None
    """A running cluster, as Ray names it (``ray://host:10001``, ``host:6379``); None starts one on this machine."""
    gpus_per_part: float = Field(default=1.0, ge=0)
    """GPUs that Ray reserves for a part; 0 for CPUs."""
    cpus_per_part: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for a part."""


class Resources(FrozenModel):
    """How much of this machine each stage takes: never part of a fingerprint."""

    train: TrainResources = TrainResources()
    """The joint training."""
    baselines: TrainResources = TrainResources()
    """Each baseline's training."""
    parallel_baselines: int = Field(default=1, ge=1)
    """How many baselines train at the same time."""
    annotate: AnnotateResources = AnnotateResources()
    """The annotators."""
    encode: EncodeResources = EncodeResources()
    """The encoders of latents and text."""
    annotate_fan_out: FanOut = FanOut()
    """How many workers share an annotation."""
    evaluate: EvaluateResources = EvaluateResources(num_threads=2)
    """Models and feature extractors of the evaluation."""
    evaluate_fan_out: FanOut = FanOut(shards_per_part=8)
    """How many workers share the generation of a cell's images."""


class RunConfig(FrozenModel):
    """One complete run, dataset to table."""

    name: PresetName
    """The preset it started from."""
    ingest: IngestConfig
    """Which image pairs."""
    annotate: tuple[AnnotateConfig, ...]
    """Which condition maps, and what makes them."""
    encode: EncodeConfig
    """Whose autoencoder makes the latents; the trainings' base."""
    train: TrainConfig
    """The joint training."""
    baselines: BaselinesConfig = BaselinesConfig()
    """What differs for the baselines."""
    evaluate: EvaluateConfig
    """How the table is made."""
    resources: Resources = Resources()
    """How much of this machine each stage takes."""

    @model_validator(mode="after")
    def _check_baselines(self) -> Self:
        unknown = [name for name in self.baselines.controlnets if name not in self.train.vision_tasks]
        if unknown:
            raise ValueError(
                f"baselines.controlnets names {', '.join(unknown)}; the vision tasks are {', '.join(self.train.vision_tasks)}"
            )
        return self

    def baseline_trainings(self) -> dict[str, TrainConfig]:
        """Return the CN(FT) recipe of each vision task, given as many samples of it as the joint training drew.

        What the joint recipe says about examples and augmentation has no meaning for them and is left at its default; what the
        joint training starts its ControlNet from is not theirs.
        """
        plain = TrainConfig()
        dropout = self.train.dropout.model_copy(
            update={"example_pair": plain.dropout.example_pair, "overlap": plain.dropout.overlap}
        )
        samples = self.train.batch_size * self.train.num_steps / len(self.train.vision_tasks)
        steps = max(1, round(samples / self.baselines.batch_size))
        return {
            name: self.train.model_copy(
                update={
                    "method": "controlnet",
                    "controlnet": self.baselines.controlnets.get(name),
                    "vision_tasks": (name,),
                    "image_to_map_examples": plain.image_to_map_examples,
                    "map_to_image_examples": plain.map_to_image_examples,
                    "augmentation": plain.augmentation,
                    "dropout": dropout,
                    "optimizer": self.baselines.optimizer,
                    "batch_size": self.baselines.batch_size,
                    "num_steps": steps,
                }
            )
            for name in self.train.vision_tasks
        }
