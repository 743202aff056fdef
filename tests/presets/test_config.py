"""What of a configuration moves a training's fingerprint, and what its baselines take from it."""

import pytest

from prompt_diffusion.presets import PRESET_NAMES, build_preset
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
        "train.augmentation": {"classes": 0.25},
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


def test_a_baseline_starts_from_the_public_controlnet_of_its_vision_task_and_no_other_does(inputs):
    public = {"depth_to_image": "lllyasviel/sd-controlnet-depth", "seg_to_image": "lllyasviel/sd-controlnet-seg"}
    config = build_preset("demo", {"baselines.controlnets": public, "train.controlnet": "base"})
    starts = {name: training.controlnet for name, training in config.baseline_trainings().items()}
    assert starts == {name: public.get(name) for name in config.train.vision_tasks}
