"""Which datasets a training reads, and how they enter its identity."""

import pytest

from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.stage import Train, TrainInputs
from prompt_diffusion.vision_tasks import VISION_TASKS

SIX = ("depth", "hed", "seg")


@pytest.fixture
def mixed(train_refs):
    return train_refs(SIX, "six").model_copy(update={"others": (train_refs(("sketch", "hed"), "own"),)})


def test_a_vision_task_is_read_from_the_first_dataset_that_has_its_maps(mixed):
    assert [mixed.find_dataset(name) for name in ("hed_to_image", "image_to_depth", "sketch_to_image")] == [0, 0, 1]
    assert [dataset.pairs.fingerprint for dataset in mixed.datasets] == ["six-pairs", "own-pairs"]
    with pytest.raises(
        ValueError, match="'night_to_image' needs condition maps of night; there are depth, hed, seg, sketch"
    ):
        mixed.find_dataset("night_to_image")


def test_narrowing_keeps_what_is_read_of_each_dataset_and_no_dataset_that_is_not(mixed):
    both = mixed.narrow(["image_to_depth", "sketch_to_image"])
    assert [sorted(dataset.maps) for dataset in both.datasets] == [["depth"], ["sketch"]]
    assert [sorted(dataset.latents) for dataset in both.datasets] == [["depth"], ["image"]]
    alone = mixed.narrow(["sketch_to_image"])
    assert alone.pairs.fingerprint == "own-pairs"
    assert alone.others == ()
    assert mixed.narrow(VISION_TASKS).narrow(["hed_to_image"]) == mixed.narrow(["hed_to_image"])


def test_latents_that_are_not_there_are_named(mixed):
    without = mixed.model_copy(update={"latents": {"image": mixed.latents["image"]}})
    with pytest.raises(ValueError, match="the vision tasks need latents of depth; there are image"):
        without.narrow(["image_to_depth"])


def test_every_dataset_enters_the_identity_and_one_that_is_not_read_does_not(mixed, train_refs):
    config = TrainConfig(base="demo-base", vision_tasks=("image_to_depth", "sketch_to_image"))
    assert {"pairs", "maps/depth", "latents/depth", "dataset-2/pairs", "dataset-2/maps/sketch", "base"} < set(
        Train(config, mixed).identity.digests
    )
    other = mixed.model_copy(update={"others": (train_refs(("sketch",), "changed"),)})
    assert Train(config, other).identity != Train(config, mixed).identity
    six = config.model_copy(update={"vision_tasks": tuple(VISION_TASKS)})
    assert Train(six, other).identity == Train(six, mixed).identity == Train(six, train_refs(SIX, "six")).identity


def test_text_embeddings_enter_the_identity(train_refs):
    config = TrainConfig(base="demo-base")
    plain = train_refs(SIX)
    text = plain.model_copy(update={"text": plain.pairs.model_copy(update={"fingerprint": "text"})})
    assert Train(config, text).identity.digests == Train(config, plain).identity.digests | {"text": "text"}


def test_inputs_survive_the_json_that_a_training_process_is_told(mixed):
    assert TrainInputs.model_validate_json(mixed.model_dump_json()) == mixed
