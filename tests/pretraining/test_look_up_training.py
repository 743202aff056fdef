from dataclasses import replace

import numpy as np
import pytest
import torch

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.sources.scene_renderer import PALETTE
from prompt_diffusion.data.transforms import from_model_range
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.look_up.look_up import Draft
from prompt_diffusion.pretraining.latents import open_pictures
from prompt_diffusion.pretraining.look_up.config import LookUpArchitecture, LookUpConfig
from prompt_diffusion.pretraining.look_up.objective import LookUpObjective
from prompt_diffusion.pretraining.look_up.samples import SceneSampler, find_classes
from prompt_diffusion.pretraining.look_up.score import choose_example, fit_color_map, score_look_up
from prompt_diffusion.pretraining.look_up.stage import PretrainLookUp, load_look_up
from prompt_diffusion.pretraining.look_up.train import build_look_up, train_look_up
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain

RESOURCES = TrainResources(loader_threads=1, validate_every_steps=None, log_every_steps=1)
TINY = LookUpConfig(
    architecture=LookUpArchitecture(
        channels=(8, 16), context_channels=16, decoder_channels=(8, 16), num_heads=2, norm_groups=4
    ),
    shares={"seg_palette": 0.5, "depth_ramp": 0.25, "image_recolored": 0.25},
    batch_size=4,
    num_steps=6,
)


@pytest.fixture(scope="module")
def dataset(scene_inputs):
    return Dataset(pairs=scene_inputs.pairs, maps=scene_inputs.maps)


@pytest.fixture(scope="module")
def shown(dataset):
    return open_pictures(dataset, "train", RESOURCES)


@pytest.fixture
def sampler(shown):
    return SceneSampler(TINY, shown.read, len(shown.captions))


def train(sampler, folder, world=None, on_event=None):
    return train_look_up(TINY, sampler, str(folder), RESOURCES, world or World(), on_event)


def test_classes_are_found_by_colour_and_a_foreign_colour_is_named():
    classes = np.random.default_rng(0).integers(0, 6, (4, 5))
    assert (find_classes(PALETTE[classes], TINY.class_colors) == classes).all()
    with pytest.raises(ValueError, match=r"class_colors lacks \(1, 2, 3\)"):
        find_classes(np.array([[[1, 2, 3]]], np.uint8), TINY.class_colors)


def test_a_sample_is_a_function_of_seed_and_index_and_both_scenes_show_the_same_member(sampler, shown):
    batch = sampler.make_batch(range(8, 24), has_targets=True)
    again = SceneSampler(TINY, shown.read, len(shown.captions)).make_batch(range(20, 24), has_targets=True)
    for one, other in zip((batch.images, *batch.targets), (again.images, *again.targets), strict=True):
        assert torch.equal(one.unflatten(0, (2, 16))[:, 12:], other.unflatten(0, (2, 4)))
    kinds = [sampler.labels[label] for label in batch.labels]
    assert set(kinds) == set(TINY.shares)
    assert not torch.equal(*batch.targets), "the members differ"
    for number in (number for number, kind in enumerate(kinds) if kind == "seg_palette"):
        for targets in batch.targets:  # one colour for each class, in both scenes
            colors = from_model_range(targets[[number, number + 16]]).reshape(-1, 3)
            classes = batch.classes[[number, number + 16]].flatten().numpy()
            assert all(len(np.unique(colors[classes == each], axis=0)) == 1 for each in np.unique(classes))
    for index in range(40):
        draw = sampler.draw(index)
        assert draw.rows[0] // 2 != draw.rows[1] // 2, "an example is of another scene"


def test_more_scenes_that_show_the_same_classes_are_paired_where_that_is_asked_for(shown):
    def agree(fraction):
        config = TINY.model_copy(update={"agreeing_fraction": fraction})
        sampler = SceneSampler(config, shown.read, len(shown.captions))
        sets = [[tuple(sampler._list_classes(row)) for row in sampler.draw(index).rows] for index in range(60)]
        return sum(one == other for one, other in sets)

    assert agree(1.0) > agree(0.0) + 10


def test_e_is_trained_alone_at_first_and_everything_later(sampler):
    look_up, head = build_look_up(TINY)
    objective = LookUpObjective(TINY, look_up, head, sampler)
    assert TINY.num_auxiliary_steps == 3

    def list_moved(indices):
        look_up.zero_grad()
        losses, labels = objective.compute_losses(objective.prepare(indices))
        assert losses.shape == (4,)
        assert len(labels) == 4
        losses.sum().backward()
        return {name.split(".")[0] for name, p in look_up.named_parameters() if p.grad is not None}

    assert list_moved(range(8, 12)) == {"encoder"}
    assert list_moved(range(12, 16)) == {"encoder", "value_encoder", "matching", "decoder"}


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(sampler, tmp_path):
    whole, world = train(sampler, tmp_path / "whole"), World()

    def stop(event):
        if getattr(event, "step", 0) == 2:
            world.stop_requested.set()

    with pytest.raises(Stopped):
        train(sampler, tmp_path / "parts", world, stop)
    resumed = train(sampler, tmp_path / "parts")
    fresh = build_look_up(TINY)[0].state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert any(not torch.equal(fresh[name], value) for name, value in whole.state_dict().items())


def test_a_sealed_look_up_is_scored_loads_and_enters_a_controlnet(dataset, scene_inputs, tiny_base):
    stage = PretrainLookUp(TINY, dataset)
    context = Context(scene_inputs.store, RESOURCES)
    ref = obtain(stage, context)
    assert obtain(stage, context) == ref
    scores = open_manifest(ref.uri).read_file("scores.json").decode()
    assert '"new palette"' in scores
    assert '"normals"' not in scores, "the dataset has no maps of them"
    look_up = load_look_up(ref)
    unet = load_base(tiny_base).unet
    controlnet = PromptDiffusionControlNet.from_unet(unet, (4, 8, 8), look_up=look_up)
    pair, query = torch.rand(1, 6, 32, 32), torch.rand(1, 3, 32, 32)
    assert (controlnet.draft(pair, query).images == look_up.draft([(pair[:, :3], pair[:, 3:])], query).images).all()


def test_what_is_scientific_moves_the_identity(dataset):
    identity = PretrainLookUp(TINY, dataset).identity
    changes = {"num_steps": 7, "auxiliary_fraction": 0.25, "seed": 1, "mirrored_fraction": 0.0, "object_weight": 1.0}
    for name, value in changes.items():
        assert PretrainLookUp(TINY.model_copy(update={name: value}), dataset).identity != identity, name
    without = Dataset(pairs=dataset.pairs, maps={name: dataset.maps[name] for name in ("depth", "seg")})
    with pytest.raises(ValueError, match="no maps of condition 'hed'"):
        replace(PretrainLookUp(TINY, without)).identify()


def test_shares_sum_to_one_and_a_draft_is_needed():
    with pytest.raises(ValueError, match=r"shares must sum to 1, they sum to 0\.5"):
        LookUpConfig(shares={"depth": 0.5})
    with pytest.raises(ValueError, match="the draft is what a look-up is trained with"):
        LookUpConfig(architecture=LookUpArchitecture(has_decoder=False))


def test_scores_compare_with_the_copy_and_the_fit(shown):
    class Copier:
        def draft(self, pairs, query):
            return Draft(from_model_range(pairs[0][1]), torch.zeros(len(query), 8, 8))

    scores = score_look_up(Copier(), TINY, shown.read, len(shown.captions), 3, has_normals=False)
    assert len(scores) == 11
    for score in scores.values():
        assert score.rmse == pytest.approx(score.copy, abs=2e-3)  # rounded to bytes
    assert scores["new palette"].objects == scores["new palette"].objects_copy
    assert scores["negative"].fitted < 1e-2 < scores["negative"].copy
    rows = range(1, 20, 2)
    examples = [choose_example(TINY, shown.read, row, len(shown.captions)) for row in rows]
    assert all(example // 2 != row // 2 for example, row in zip(examples, rows, strict=True))


def test_a_fit_restores_a_recolouring_that_is_affine():
    source, query = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    change = lambda image: 200.0 - 0.5 * image.astype(np.float64)  # noqa: E731
    np.testing.assert_allclose(fit_color_map(source, change(source), query), change(query), atol=1.0)
