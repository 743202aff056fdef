from collections import Counter

import numpy as np
import pytest

from prompt_diffusion.data import augmentation
from prompt_diffusion.data.augmentation import (
    AUGMENTATIONS,
    AugmentationFamily,
    draw_augmentation,
    draw_target_function,
    find_augmentation,
)
from prompt_diffusion.data.held_out import HELD_OUT, resembles_held_out
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.data.target_functions import TargetFunction


@pytest.fixture(scope="module")
def scenes():
    views = [build_scene_pair(5, group, 32).edited for group in (3, 6)]
    return [{"image": view.image, **view.maps} for view in views]


def draw(family: str, index: int) -> TargetFunction:
    return draw_target_function(family, sample_generator(7, index))


@pytest.mark.parametrize("family", AUGMENTATIONS)
def test_a_function_is_one_of_its_seed_and_keeps_the_pictures_form(family, scenes):
    before = {name: picture.copy() for name, picture in scenes[0].items()}
    shown = [draw(family, index)(scenes[0]) for index in (0, 0, 1, 2)]
    assert {(picture.shape, picture.dtype) for picture in shown} == {((32, 32, 3), np.dtype(np.uint8))}
    np.testing.assert_array_equal(shown[0], shown[1])
    for one, other in ((0, 2), (0, 3), (2, 3)):
        assert np.abs(shown[one].astype(int) - shown[other]).mean() > 1.0
    for name, picture in scenes[0].items():
        np.testing.assert_array_equal(picture, before[name])


@pytest.mark.parametrize(
    ("family", "source"), [("classes", "seg"), ("depth_colors", "depth"), ("photo_colors", "image")]
)
def test_a_function_gives_a_color_the_same_color_on_both_sides(family, source, scenes):
    for index in range(6):
        function = draw(family, index)
        colors: dict[tuple[int, ...], tuple[int, ...]] = {}
        for scene in scenes:
            pairs = np.concatenate([scene[source], function(scene)], axis=2).reshape(-1, 6).tolist()
            for pair in pairs:
                assert colors.setdefault(tuple(pair[:3]), tuple(pair[3:])) == tuple(pair[3:])


def test_a_mixture_has_the_same_regions_on_both_sides(scenes):
    for index in range(6):
        function = draw("region_mixture", index)
        side_by_side = {name: np.concatenate([scene[name] for scene in scenes], axis=1) for name in scenes[0]}
        apart = np.concatenate([function(scene) for scene in scenes], axis=1)
        inner = np.r_[2:30, 34:62]  # lines are widened across the border of two pictures
        np.testing.assert_array_equal(function(side_by_side)[:, inner], apart[:, inner])


def test_classes_are_merged_in_some_palettes_and_not_in_most(scenes):
    num_classes = len(np.unique(scenes[0]["seg"].reshape(-1, 3), axis=0))
    shown = [draw("classes", index)(scenes[0]).reshape(-1, 3) for index in range(48)]
    num_colors = [len(np.unique(picture, axis=0)) for picture in shown]
    assert max(num_colors) == num_classes > 3
    assert 1 <= sum(count < num_classes for count in num_colors) <= 20


def test_shares_are_respected_and_each_sample_depends_on_its_index_alone():
    shares = {"classes": 0.4, "geometry": 0.1}
    drawn = [draw_augmentation(shares, 3, index) for index in range(500)]
    counts = Counter(each.family if each else None for each in drawn)
    assert counts["classes"] == pytest.approx(200, abs=45)
    assert counts["geometry"] == pytest.approx(50, abs=27)
    again = [draw_augmentation(shares, 3, index) for index in (499, 20, 7)]
    assert [each and each.family for each in again] == [drawn[i] and drawn[i].family for i in (499, 20, 7)]
    assert {each.family for each in (draw_augmentation({"classes": 1.0}, 0, index) for index in range(50)) if each} == {
        "classes"
    }


def test_without_shares_no_sample_is_augmented():
    assert all(draw_augmentation({}, 0, index) is None for index in range(20))


def test_a_draw_that_is_held_out_is_drawn_again(monkeypatch):
    refused = [member.build(0) for member in HELD_OUT.values() if member.sources == ("image",)]
    allowed = draw("photo_colors", 0)
    pending = [*refused, allowed]
    family = AugmentationFamily(("image",), lambda generator: pending.pop(0))
    monkeypatch.setitem(augmentation.AUGMENTATIONS, "photo_colors", family)
    assert draw("photo_colors", 1) is allowed
    assert not resembles_held_out(allowed)


def test_an_unknown_family_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="unknown augmentation 'palettes': choose from classes, depth_colors, "):
        find_augmentation("palettes")
