"""Configurations for a laptop, on ray-cast scenes: the demo, in minutes, and the same cut down to seconds."""

from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.ingest import IngestConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.engine.config import NoiseConfig, OptimizerConfig, TrainResources
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources
from prompt_diffusion.model.references import DEMO_BASE
from prompt_diffusion.presets.config import BaselinesConfig, Resources, RunConfig
from prompt_diffusion.training.config import DropoutConfig, SamplingConfig, TrainConfig
from prompt_diffusion.training.encode import EncodeConfig


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
