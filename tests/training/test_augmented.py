"""Augmented samples: what is in them, and that the others are what they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prompt_diffusion.data.augmentation import draw_augmentation
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.engine.noise import draw_timestep, sample_noise
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import encode_posterior
from prompt_diffusion.training.loss import InContextObjective
from prompt_diffusion.training.rows import open_training_data
from prompt_diffusion.training.samples import BatchMaker, draw_sample
from prompt_diffusion.training.stage import Train
from prompt_diffusion.training.train import build_controlnet

NUM_SAMPLES = 48
SHARES = {"classes": 0.2, "region_mixture": 0.2, "photo_colors": 0.1}


@pytest.fixture(scope="module")
def config(tiny_config):
    return TrainConfig.model_validate(tiny_config.model_dump() | {"augmentation": SHARES})


def make(config, data, fixed_texts, *pieces):
    maker = BatchMaker(config, data, fixed_texts, 1000)
    try:
        return [maker.make(piece) for piece in pieces]
    finally:
        maker.close()


def read_pictures(rows, row, side):
    return {
        "image": rows.image(row, side, None),
        **{name: rows.image(row, side, name) for name in ("depth", "hed", "seg")},
    }


def test_samples_that_are_not_augmented_are_those_of_the_recipe_without(config, tiny_config, data, fixed_texts):
    [ours], [plain] = (make(each, data, fixed_texts, range(NUM_SAMPLES)) for each in (config, tiny_config))
    assert plain.made_targets is None
    kept = [slot for slot in range(NUM_SAMPLES) if draw_augmentation(SHARES, config.seed, slot) is None]
    assert 10 < len(kept) < 40
    for name in ("queries", "clean", "noise", "timesteps", "text", "has_example"):
        assert torch.equal(getattr(ours, name)[kept], getattr(plain, name)[kept]), name
    for our_side, plain_side in zip(ours.example_pairs, plain.example_pairs, strict=True):
        assert torch.equal(our_side[kept], plain_side[kept])
    assert [ours.labels[slot] for slot in kept] == [plain.labels[slot] for slot in kept]


def test_an_augmented_sample_shows_one_function_on_both_sides_in_either_direction(config, data, fixed_texts):
    [batch] = make(config, data, fixed_texts, range(NUM_SAMPLES))
    made = dict(zip(batch.made_targets.slots.tolist(), batch.made_targets.images.numpy(), strict=True))
    seen = set()
    for slot in range(NUM_SAMPLES):
        draw = draw_sample(config, data, slot)
        if draw.augmentation is None:
            assert slot not in made
            continue
        function, rows = draw_augmentation(SHARES, config.seed, slot).function, draw.data.rows
        example, query = read_pictures(rows, draw.example_row, "input"), read_pictures(rows, draw.row, "edited")
        source, target = (side[slot].numpy() for side in batch.example_pairs)
        seen.add((draw.augmentation.family, draw.vision_task.direction))
        assert batch.labels[slot] == len(config.vision_tasks) + list(SHARES).index(draw.augmentation.family)
        if draw.vision_task.direction == "image_to_map":
            np.testing.assert_array_equal(source, example["image"])
            np.testing.assert_array_equal(target, function(example))
            np.testing.assert_array_equal(batch.queries[slot], query["image"])
            np.testing.assert_array_equal(made[slot], function(query))
            np.testing.assert_array_equal(batch.text[slot], fixed_texts[""])
        else:
            np.testing.assert_array_equal(source, function(example))
            np.testing.assert_array_equal(target, example["image"])
            np.testing.assert_array_equal(batch.queries[slot], function(query))
            assert slot not in made
            mean, std = map(torch.from_numpy, draw.data.read_posterior(None, draw.row))
            draw_timestep(draw.generator, config.noise, 1000)
            assert torch.equal(batch.clean[slot], mean + std * sample_noise(draw.generator, mean.shape))
    assert len(seen) == 6


def test_a_batch_does_not_depend_on_how_it_is_cut(config, data, fixed_texts):
    [whole] = make(config, data, fixed_texts, range(24))
    parts = make(config, data, fixed_texts, range(7), range(7, 8), range(8, 24))
    for name in ("queries", "clean", "noise", "timesteps", "text"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    images = [part.made_targets.images for part in parts if part.made_targets is not None]
    assert torch.equal(whole.made_targets.images, torch.cat(images))


def test_a_made_target_is_encoded_as_the_stage_would_have_encoded_it(config, data, base):
    objective = InContextObjective(config, base, build_controlnet(config, base), data, torch.device("cpu"))
    assert objective.labels == (*config.vision_tasks, *SHARES)
    batch = objective.prepare(range(16))
    mean, std = map(torch.from_numpy, encode_posterior(base.vae, batch.made_targets.images.numpy()))
    clean = batch.clean.clone()
    slots = batch.made_targets.slots
    clean[slots] = mean + std * clean[slots]
    with torch.no_grad():
        made, _ = objective.compute_losses(batch)
        encoded, _ = objective.compute_losses(replace(batch, clean=clean, made_targets=None))
        noise, _ = objective.compute_losses(replace(batch, made_targets=None))
    objective.close()
    assert torch.equal(made, encoded)
    assert not torch.equal(made[slots], noise[slots])


def test_augmentation_moves_the_fingerprint_and_its_absence_does_not(tiny_config, config, train_inputs):
    identity = Train(tiny_config, train_inputs).identity
    assert "augmentation" not in identity.config
    assert Train(config, train_inputs).identity.config["augmentation"] == SHARES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": {"palettes": 0.5}}, "unknown augmentation 'palettes': choose from classes, "),
        ({"augmentation": {"classes": 0.7, "geometry": 0.4}}, "shares must sum to 1 or less, they sum to 1.1"),
        ({"augmentation": {"classes": 0.0}}, "the share of 'classes' must be above 0, it is 0.0"),
        (
            {"augmentation": {"region_mixture": 0.1}, "vision_tasks": ("image_to_depth", "seg_to_image")},
            "'region_mixture' reads maps of hed, which no vision task of the recipe has",
        ),
        (
            {"augmentation": {"classes": 0.5}, "vision_tasks": ("image_to_seg",), "method": "controlnet"},
            "augmentation is nothing for a controlnet baseline",
        ),
    ],
)
def test_a_recipe_that_cannot_be_augmented_so_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(tiny_config.model_dump() | changes)


def test_maps_of_several_datasets_are_not_mixed_up(tiny_config, train_inputs, tmp_path):
    one, other = (
        train_inputs.model_copy(update={"maps": {name: train_inputs.maps[name] for name in names}})
        for names in (("depth",), ("hed", "seg"))
    )
    inputs = one.model_copy(update={"others": (other,)})
    config = tiny_config.model_copy(update={"augmentation": {"classes": 1.0}})
    data = open_training_data(config, inputs, ShardCache(tmp_path), "train")
    for index in range(12):
        assert "seg" in draw_sample(config, data, index).data.rows.maps
    with pytest.raises(ValueError, match="'region_mixture' reads maps of depth, hed, seg of one dataset"):
        open_training_data(
            config.model_copy(update={"augmentation": {"region_mixture": 1.0}}), inputs, ShardCache(tmp_path), "train"
        )
