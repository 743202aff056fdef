"""The published configuration holds the paper's values, and departs from them where it says so."""

from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.presets import build_preset
from prompt_diffusion.training.config import SamplingConfig, TrainConfig


def test_paper_has_the_published_values():
    train, evaluate = build_preset("paper").train, build_preset("paper").evaluate
    assert train.draw == "group"
    assert (evaluate.draw, evaluate.extractor) == ("group", "inception")
    assert (train.batch_size, train.num_steps, train.optimizer.name, train.optimizer.learning_rate) == (
        512,
        5000,
        "adamw",
        1e-4,
    )
    assert (train.noise.prediction_type, train.noise.late_fraction) == ("epsilon", 0.0)
    assert (train.dropout.text_map_to_image, train.dropout.example_pair, train.dropout.overlap) == (0.10, 0.10, 0.05)
    assert (train.stem_channels, train.train_decoder) == ((16, 32, 96, 256), True)
    assert (evaluate.num_samples, evaluate.image_to_map_num_inference_steps, evaluate.map_to_image_guidance_scale) == (
        10_000,
        100,
        9.0,
    )
    assert build_preset("paper").ingest.image_size == 256
    assert train.optimizer == OptimizerConfig()
    assert (train.optimizer.name, train.optimizer.flat_fraction, train.optimizer.warmup_steps) == ("adamw", 1.0, 0)
    assert (train.optimizer.clip_norm, train.optimizer.ema_decay, train.noise.min_snr_gamma) == (None, None, None)
    assert train.image_to_map_examples == train.map_to_image_examples == {"same_group": 1.0}
    assert train.controlnet is None
    assert build_preset("paper").ingest.split_fractions == (0.90, 0.05, 0.05)


def test_papers_one_departure_in_training_is_its_precision_and_a_field_takes_it_back():
    plain = TrainConfig(
        base=build_preset("paper").train.base,
        draw="group",
        sampling=SamplingConfig(num_inference_steps=100, guidance_scale=9.0),
    )
    assert build_preset("paper").train == plain.model_copy(update={"precision": "bfloat16"})
    assert build_preset("paper", {"train.precision": "float32"}).train == plain
