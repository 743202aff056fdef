import pytest

from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.presets import PRESET_NAMES, build_preset
from prompt_diffusion.training.config import SamplingConfig, TrainConfig
from prompt_diffusion.training.stage import Train


def list_leaves(content, path=()):
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from list_leaves(value, (*path, key))
    else:
        yield path, content


def change(value):
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value * 0.5 if value else 0.25
    if isinstance(value, int):
        return value + 1
    return None


@pytest.fixture
def inputs(train_refs):
    return train_refs(("depth", "hed", "seg"))


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_survives_a_round_trip_through_json(name):
    config = build_preset(name)
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_paper_has_the_published_values():
    train, evaluate = build_preset("paper").train, build_preset("paper").evaluate
    assert train.draw == "group"
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


def test_every_scientific_field_of_a_training_moves_its_fingerprint(inputs):
    config = build_preset("demo").train
    fingerprints = {Train(config, inputs).identity.fingerprint}
    leaves = [(path, change(value)) for path, value in list_leaves(config.model_dump()) if change(value) is not None]
    shares = {"image_to_map_examples", "map_to_image_examples"}  # they must sum to 1: below
    leaves = [(path, value) for path, value in leaves if path[0] not in shares]
    changes = {f"train.{'.'.join(path)}": value for path, value in leaves}
    changes |= {
        "train.image_to_map_examples": {"same_row": 1.0},
        "train.map_to_image_examples": {"same_row": 1.0},
        "train.vision_tasks": ["image_to_hed"],
        "train.optimizer.name": "adamw",
        "train.optimizer.clip_norm": 1.0,
        "train.optimizer.skip_norm": 1.0,
        "train.optimizer.ema_decay": 0.99,
        "train.noise.min_snr_gamma": 5.0,
        "train.precision": "bfloat16",
        "train.noise.prediction_type": "epsilon",
        "train.stem_channels": [8, 16, 32],
    }
    for key, value in changes.items():
        fingerprint = Train(build_preset("demo", {key: value}).train, inputs).identity.fingerprint
        assert fingerprint not in fingerprints, key
        fingerprints.add(fingerprint)
    assert len(fingerprints) > 20


def test_no_resource_field_moves_a_fingerprint(inputs):
    expected = Train(build_preset("demo").train, inputs).identity
    for path, value in list_leaves(build_preset("demo").resources.model_dump()):
        if change(value) is not None:
            overridden = build_preset("demo", {f"resources.{'.'.join(path)}": change(value)})
            assert Train(overridden.train, inputs).identity == expected


def test_a_baseline_gets_as_many_samples_of_its_vision_task_as_the_joint_model():
    for name in PRESET_NAMES:
        config = build_preset(name)
        joint = config.train.batch_size * config.train.num_steps / len(config.train.vision_tasks)
        baselines = config.baseline_trainings()
        assert set(baselines) == set(config.train.vision_tasks)
        for task, baseline in baselines.items():
            assert baseline.vision_tasks == (task,)
            assert baseline.method == "controlnet"
            assert abs(baseline.batch_size * baseline.num_steps - joint) <= baseline.batch_size / 2


@pytest.mark.parametrize(
    "change_of_the_joint_training",
    [
        {"train.optimizer.muon_learning_rate": 0.01},
        {"train.optimizer.ema_decay": 0.99},
        {"train.image_to_map_examples": {"same_row": 1.0}},
        {"train.dropout.example_pair": 0.2},
    ],
)
def test_what_concerns_the_joint_training_alone_trains_no_baseline_again(change_of_the_joint_training, inputs):
    plain, changed = build_preset("demo"), build_preset("demo", change_of_the_joint_training)
    assert Train(changed.train, inputs).identity != Train(plain.train, inputs).identity
    for before, after in zip(plain.baseline_trainings().values(), changed.baseline_trainings().values(), strict=True):
        assert Train(after, inputs).identity == Train(before, inputs).identity
    own = build_preset("demo", {"baselines.optimizer.muon_learning_rate": 0.01}).baseline_trainings()
    assert own["image_to_hed"] != plain.baseline_trainings()["image_to_hed"]


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


def test_a_baseline_starts_from_the_public_controlnet_of_its_vision_task_and_no_other_does(inputs):
    public = {"depth_to_image": "lllyasviel/sd-controlnet-depth", "seg_to_image": "lllyasviel/sd-controlnet-seg"}
    config = build_preset("demo", {"baselines.controlnets": public, "train.controlnet": "base"})
    starts = {name: training.controlnet for name, training in config.baseline_trainings().items()}
    assert starts == {name: public.get(name) for name in config.train.vision_tasks}


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
