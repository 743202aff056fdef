"""A preset is changed by dotted name, and a mistake in that is one sentence."""

import pytest

from prompt_diffusion.presets import build_preset


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("demos", {}, "unknown preset 'demos': choose one of smoke, demo, paper"),
        ("demo", {"train.batchsize": 3}, "unknown field 'train.batchsize': did you mean 'batch_size'"),
        ("demo", {"trian.batch_size": 3}, "unknown field 'trian.batch_size': did you mean 'train'"),
        ("demo", {"train.num_steps": 0}, "train.num_steps: Input should be greater than or equal to 1, got 0"),
        ("demo", {"train.optimizer.name": "sgd"}, "train.optimizer.name: Input should be 'adamw' or 'muon', got 'sgd'"),
        ("demo", {"train.vision_tasks": ["image2xray"]}, "unknown vision task 'image2xray'"),
        ("demo", {"train.vision_tasks": ["image_to_depht"]}, "did you mean 'image_to_depth'"),
        (
            "demo",
            {"baselines.controlnets": {"canny_to_image": "a/b"}},
            "baselines.controlnets names canny_to_image; the vision tasks are depth_to_image",
        ),
        ("demo", {"train.image_to_map_examples": {"same_row": 0.4}}, r"shares must sum to 1, they sum to 0\.4"),
        ("demo", {"annotate.7.condition": "hed"}, "unknown field 'annotate.7.condition'"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(name, overrides, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build_preset(name, overrides)
    assert "\n" not in str(caught.value)


def test_the_base_is_changed_in_one_place():
    config = build_preset("demo", {"train.base": "somewhere/else"})
    assert config.encode.base == "somewhere/else"


def nest(depth):
    value = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"train": 1}, "train: Input should be a valid dictionary or instance of TrainConfig, got 1"),
        ({"train": {"a": 1}}, "train.a: Extra inputs are not permitted, got 1"),
        ({"train": None}, "train: Input should be"),
        ({"train": []}, "train: Input should be"),
        ({"encode": "x"}, "encode: Input should be"),
        ({"encode": {}}, "encode.base .* and train.base .* must be the same|encode.base"),
        ({"resources": 3}, "resources: Input should be"),
        ({"train.num_steps.x": 3}, "unknown field 'train.num_steps.x': train.num_steps has no fields"),
        ({"train.base.0": "x"}, "unknown field 'train.base.0': train.base has no fields"),
        ({"train": nest(10)}, "train.a: Extra inputs are not permitted"),
        ({"train": nest(3000)}, "train: no field is nested deeper than 20 levels"),
        ({"train.optimizer.learning_rate": float("inf")}, "learning_rate: Input should be a finite number, got inf"),
        ({"train.optimizer.learning_rate": float("nan")}, "learning_rate: Input should be "),
        ({"train.dropout.example_pair": float("nan")}, "example_pair: Input should be "),
        ({"ingest.source.num_groups": 10**12}, "num_groups: Input should be less than or equal to 1000000"),
        ({"ingest.source.num_groups": True}, "num_groups: Input should be a valid integer, .* got 'true'"),
        ({"train.num_steps": False}, "num_steps: Input should be a valid integer, .* got 'false'"),
        ({"train.optimizer.learning_rate": True}, "learning_rate: Input should be a valid number, .* got 'true'"),
        ({"train.stem_channels": [16, True, 64]}, "stem_channels.1: Input should be a valid integer"),
        ({"train.map_to_image_examples": {"same_group": True}}, "map_to_image_examples.*: Input should be"),
        ({"resources.train.cache_bytes": True}, "cache_bytes: Input should be a valid integer"),
    ],
)
def test_any_value_that_is_none_of_the_field_s_is_one_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build_preset("demo", overrides)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_a_truth_value_is_taken_where_one_is_asked_for():
    assert build_preset("demo", {"resources.train.compile": True}).resources.train.compile is True
    assert build_preset("demo", {"train.train_decoder": False}).train.train_decoder is False


def test_a_whole_part_can_be_set_at_once():
    part = build_preset("demo").train.model_dump(mode="json") | {"num_steps": 7}
    assert build_preset("demo", {"train": part}).train.num_steps == 7


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000])
def test_json_that_python_cannot_read_is_one_sentence(value):
    from prompt_diffusion.cli.shared import parse_overrides

    with pytest.raises(ValueError, match=r"^--set train: its value is no JSON that can be read") as caught:
        parse_overrides([f"train={value}"])
    assert type(caught.value) is ValueError
