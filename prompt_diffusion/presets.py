"""Complete configurations: ``smoke`` (seconds, for tests), ``demo`` (minutes, a laptop), ``paper`` (the published numbers).

A run is a preset plus overrides, validated before anything starts.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.ingest import IngestConfig
from prompt_diffusion.data.sources.instruct_pix2pix import InstructPix2PixConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig, TrainResources
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources
from prompt_diffusion.frozen import FrozenModel, say_first_error
from prompt_diffusion.model.references import DEMO_BASE
from prompt_diffusion.training.config import DropoutConfig, SamplingConfig, TrainConfig
from prompt_diffusion.training.encode import EncodeConfig, EncodeResources

PresetName = Literal["smoke", "demo", "paper"]
PRESET_NAMES: tuple[PresetName, ...] = ("smoke", "demo", "paper")


class BaselinesConfig(FrozenModel):
    """The CN(FT) baselines: the joint recipe with the query alone, one vision task each.

    The optimizer is their own, so that tuning the joint training's trains no baseline again.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    batch_size: int = Field(default=128, ge=1)
    """Samples a step. The number of steps follows: as many samples of its vision task as the joint model saw of it."""
    controlnets: dict[str, str] = {}
    """ControlNet that the baseline of a vision task starts from, a folder or a hub's repository, such as
    ``{"depth_to_image": "lllyasviel/sd-controlnet-depth"}``; the others start from the base's encoder."""


class FanOut(FrozenModel):
    """How the shards of a large stage are shared among workers: never part of a fingerprint."""

    engine: Literal["threads", "ray"] = "threads"
    """Threads of this process, one a device, or a Ray cluster (the extra 'ray')."""
    devices: tuple[str, ...] = ()
    """The devices of one process, in place of the stage's own; with threads, as many parts run at once as there are."""
    shards_per_part: int = Field(default=32, ge=1)
    """Shards a task. Parts are fat: a task's overhead and the loading of weights must not show."""
    ray_address: str | None = None
    """A running cluster, as Ray names it (`ray://host:10001`, `host:6379`); None starts one on this machine."""
    gpus_per_part: float = Field(default=1.0, ge=0)
    """GPUs that Ray keeps for a part; 0 for CPUs."""
    cpus_per_part: float = Field(default=1.0, ge=0)
    """CPUs that Ray keeps for a part."""


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

        What the joint recipe says of examples has no meaning for them and is left at its default; what the joint training
        starts its ControlNet from is not theirs.
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
                    "dropout": dropout,
                    "optimizer": self.baselines.optimizer,
                    "batch_size": self.baselines.batch_size,
                    "num_steps": steps,
                }
            )
            for name in self.train.vision_tasks
        }


def paper() -> RunConfig:
    """Return the published configuration (Wang et al., NeurIPS 2023, arXiv 2305.01115), each value with its source.

    "The code" is the authors' repository, Zhendong-Wang/Prompt-Diffusion at 8ecd2d1.

    - Data: CLIP-filtered InstructPix2Pix, 313,010 prompt groups, 90/5/5 in source order, 256 px by Lanczos, no augmentation
      (the code).
    - Maps: MiDaS dpt_hybrid, HED (BSDS500), segmentation in ADE20K colours (section 4), of the images at their own
      resolution, resized once by Lanczos (the code). The published segmentation network, UniFormer, is in no maintained
      package: UperNet takes its place, on the same classes and colours.
    - Model: SD v1.5; the ControlNet a copy of its encoder (section 3.2); stems of 16, 16, 32, 32, 96, 96, 256 channels, images
      in [-1, 1] (the code); ControlNet and SD's decoder trained (the code: the flag that should lock the decoder is inverted).
    - Samples: vision tasks and prompt groups drawn uniformly, then a pair of the group (the code: ``train.draw``); the example
      from the input image of the same prompt group, query and target from the edited image; the edited caption, or "depth
      map", "hed map", "segmentation map" (the code).
    - Dropout: one uniform number; text 0.10, example pair 0.10, both 0.05 (the code).
    - Loss: noise prediction, L2, all samples alike, timesteps uniform over SD's own 1000 steps (the code).
    - Optimizer: AdamW 1e-4, constant, not clipped, no EMA (the code; its decay and betas are presumed to be torch's defaults);
      batch 512 (section 4; the author names 256 x 4 GPUs in an issue, the published yaml gives 2048), 5,000 steps (the released
      weights are of step 4,999, after "nearly 20 epochs": 18.2 at 1,024, 9.1 at 512). The seed is ours.
    - Precision: the recipe's one departure, so that one GPU trains it in hours, not days. Published is float32 throughout
      (the code), which ``train.precision=float32`` restores; here the networks compute in bfloat16 by autocast, while
      weights, optimizer and loss stay float32.
    - Baselines: CN(FT)'s schedule is not public. Ours: the same recipe with the query alone, one vision task each, batch 128,
      as many samples of it as the joint model sees, from SD's encoder; ``baselines.controlnets`` starts them from public
      ControlNets.
    - Evaluation: DDIM, 100 steps, eta 0, guidance 9, the published suffix and negative prompt, the example of the same prompt
      group, 10,000 test images a vision task (section 4 and the code). The in-context test is ours. The same steps and
      guidance are the model's own (``train.sampling``).
    - Resources change no result: published is gradient checkpointing, which saves memory alone and is off here.
    """
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    training = TrainResources(loader_threads=8, checkpoint_every_seconds=300.0, validate_every_steps=500)
    return RunConfig(
        name="paper",
        ingest=IngestConfig(source=InstructPix2PixConfig(uri="data/instruct-pix2pix"), image_size=256),
        annotate=(
            AnnotateConfig(condition="depth", annotator="depth_midas", resolution="native"),
            AnnotateConfig(condition="hed", annotator="hed_bsds500", resolution="native"),
            AnnotateConfig(condition="seg", annotator="seg_upernet", resolution="native"),
        ),
        encode=EncodeConfig(base=base),
        train=TrainConfig(
            base=base,
            draw="group",
            precision="bfloat16",
            sampling=SamplingConfig(num_inference_steps=100, guidance_scale=9.0),
        ),
        baselines=BaselinesConfig(batch_size=128),
        evaluate=EvaluateConfig(),
        resources=Resources(train=training, baselines=training),
    )


def demo() -> RunConfig:
    """Return what two CPU cores do in 20 minutes: ray-cast scenes at 64 px and a base of 4 million parameters.

    It departs from the paper where a short budget asks for it, and each departure is a field: Muon and a decaying rate,
    v-prediction with zero terminal SNR (the base's own), text dropped from half of the image-to-map samples so that the
    pair alone must decide, and examples from other scenes, so that copying the example does not pay.
    """
    optimizer = OptimizerConfig(
        name="muon",
        learning_rate=1e-3,
        muon_learning_rate=0.02,
        weight_decay=0.0,
        warmup_steps=10,
        flat_fraction=0.4,
        final_factor=0.02,
    )
    return RunConfig(
        name="demo",
        ingest=IngestConfig(source=ScenesConfig(num_groups=1500), image_size=64, shard_rows=125),
        annotate=tuple(AnnotateConfig(condition=name) for name in ("depth", "hed", "seg")),
        encode=EncodeConfig(base=DEMO_BASE),
        train=TrainConfig(
            base=DEMO_BASE,
            image_to_map_examples={"other_group": 1.0},
            map_to_image_examples={"same_row": 0.7, "other_group": 0.3},
            dropout=DropoutConfig(text_map_to_image=0.15, text_image_to_map=0.5, example_pair=0.10, overlap=0.05),
            noise=NoiseConfig(prediction_type="v_prediction", late_fraction=0.5),
            optimizer=optimizer,
            stem_channels=(16, 32, 64),
            sampling=SamplingConfig(num_inference_steps=12, guidance_scale=2.5),
            batch_size=32,
            num_steps=850,
        ),
        baselines=BaselinesConfig(optimizer=optimizer, batch_size=32),
        evaluate=EvaluateConfig(
            num_samples=75,
            num_in_context=48,
            map_to_image_num_inference_steps=10,
            image_to_map_num_inference_steps=2,
            map_to_image_guidance_scale=2.5,
            image_to_map_guidance_scale=1.0,
            example_policy="other_group",
            prompt_suffix="",
            negative_prompt="",
        ),
        resources=Resources(
            train=TrainResources(num_processes=2, device_batch_size=16, validate_every_steps=425),
            baselines=TrainResources(validate_every_steps=None),
            parallel_baselines=2,
            evaluate=EvaluateResources(batch_size=25, num_threads=2),
        ),
    )


def smoke() -> RunConfig:
    """Return the demo cut down to seconds: it shows that every stage runs, and learns nothing."""
    full = demo()
    return full.model_copy(
        update={
            "name": "smoke",
            "ingest": IngestConfig(source=ScenesConfig(num_groups=60), image_size=64, shard_rows=32),
            "train": full.train.model_copy(
                update={
                    "batch_size": 6,
                    "num_steps": 4,
                    "sampling": SamplingConfig(num_inference_steps=2, guidance_scale=2.5),
                }
            ),
            "baselines": full.baselines.model_copy(update={"batch_size": 2}),
            "evaluate": full.evaluate.model_copy(
                update={
                    "num_samples": 3,
                    "num_in_context": 2,
                    "map_to_image_num_inference_steps": 2,
                    "image_to_map_num_inference_steps": 2,
                }
            ),
            "resources": full.resources.model_copy(
                update={
                    "train": TrainResources(validate_every_steps=4),
                    "evaluate": full.resources.evaluate.model_copy(update={"num_threads": 1}),
                }
            ),
        }
    )


_MAX_DEPTH = 20
_PRESETS = {"smoke": smoke, "demo": demo, "paper": paper}


def build_preset(name: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Return a preset with single fields changed by dotted name, for example ``{"train.num_steps": 100}``.

    ValueError, in one sentence, names an unknown preset or field, or the field, the value and what is allowed.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}")
    content = _PRESETS[name]().model_dump()
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    _join_bases(content, is_chosen=bool({"encode", "encode.base"} & set(overrides or {})))
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(say_first_error(error, whole=name)) from None


def _join_bases(content: dict[str, Any], *, is_chosen: bool) -> None:
    """Let the encoders follow the training's base; ValueError where another was chosen for them."""
    encode, train = content["encode"], content["train"]
    if not (isinstance(encode, dict) and isinstance(train, dict)):
        return  # what is no configuration at all is refused as such
    base = train.get("base", TrainConfig().base)
    if encode.get("base", EncodeConfig.model_fields["base"].default) == base:
        return
    if is_chosen:
        raise ValueError(f"encode.base {encode.get('base')!r} and train.base {base!r} must be the same")
    encode["base"] = base


def _override(content: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - any field's value
    """Set one field of a nested dictionary (lists by position); ValueError names the nearest field that exists."""
    _check_depth(key, value)
    *path, last = key.split(".")
    inner: Any = content
    for depth, part in enumerate([*path, last]):
        names = (
            [str(i) for i in range(len(inner))]
            if isinstance(inner, list | tuple)
            else list(inner)
            if isinstance(inner, dict)
            else []
        )
        if not isinstance(inner, dict | list | tuple) or part not in names:
            where = ".".join(path[:depth])
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown field {key!r}: {hint}{f'{where} has' if where else 'there are'} {', '.join(names) or 'no fields'}"
            )
        if depth == len(path):
            break
        if isinstance(inner, list | tuple):
            inner = inner[int(part)]
        else:
            if isinstance(inner[part], tuple):
                inner[part] = list(inner[part])
            inner = inner[part]
    inner[int(last) if isinstance(inner, list) else last] = value


def _check_depth(key: str, value: Any) -> None:  # noqa: ANN401 - any field's value
    """Refuse what is nested deeper than any field."""
    layer, depth = [value], 0
    while layer := [
        inner
        for each in layer
        if isinstance(each, dict | list | tuple)
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"{key}: no field is nested deeper than {_MAX_DEPTH} levels, and this value is")
