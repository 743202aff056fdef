import numpy as np
import pytest

from prompt_diffusion.data.families import FAMILIES, find_source, vary
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.sources.scenes import build_scene_pair


@pytest.fixture(scope="module")
def pictures():
    view = build_scene_pair(5, 0, 64).edited
    return {"image": view.image, **view.maps}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_member_is_a_function_of_its_seed_and_keeps_the_pictures_form(kind, pictures):
    source = pictures[find_source(kind)]
    before = source.copy()
    first, again = (vary(kind, source, sample_generator(0, 7)) for _ in range(2))
    assert (first.shape, first.dtype) == (source.shape, np.uint8)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(source, before)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"image_mirrored"}))
def test_members_differ_from_each_other_and_from_their_source(kind, pictures):
    source = pictures[find_source(kind)].astype(int)
    members = [vary(kind, pictures[find_source(kind)], sample_generator(0, index)).astype(int) for index in range(6)]
    for place, member in enumerate(members):
        others = [source, *members[:place]]
        assert min(np.abs(member - other).mean() for other in others) > 2.0


@pytest.mark.parametrize("kind", ["depth_ramp", "seg_palette", "image_recolored"])
def test_a_member_does_the_same_to_a_part_as_to_the_whole(kind, pictures):
    source = pictures[find_source(kind)]
    whole, part = (vary(kind, shown, sample_generator(3, 1)) for shown in (source, source[16:48, 8:40]))
    np.testing.assert_array_equal(whole[16:48, 8:40], part)


def test_a_palette_gives_each_class_one_color_of_its_own(pictures):
    seg = pictures["seg"]
    member = vary("seg_palette", seg, sample_generator(1, 0))
    pairs = np.unique(np.concatenate([seg, member], axis=2).reshape(-1, 6), axis=0)
    assert len(pairs) == len(np.unique(seg.reshape(-1, 3), axis=0)) == len(np.unique(pairs[:, 3:], axis=0)) > 2


def test_a_change_of_colors_keeps_greys_grey_and_their_order():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    directions = set()
    for index in range(12):
        member = vary("image_recolored", ramp, sample_generator(2, index)).astype(int)
        assert np.ptp(member, axis=2).max() <= 1
        slope = np.sign(np.diff(member[0, :, 0]))
        assert len(set(slope) - {0}) == 1
        directions.add(int(slope.sum() > 0))
    assert directions == {0, 1}, "some are negatives, some are not"


def test_lines_are_drawn_thicker_never_thinner(pictures):
    lines = pictures["hed"][..., 0] > 128
    for index in range(8):
        member = vary("hed_style", pictures["hed"], sample_generator(4, index)).astype(int)
        ground = member[lines == 0]
        color = member[pictures["hed"][..., 0].argmax() // 64, pictures["hed"][..., 0].argmax() % 64]
        assert np.abs(color - np.median(ground, axis=0)).max() > 0
        near = np.abs(member - color).max(axis=2) < np.abs(color - np.median(ground, axis=0)).max() / 2
        assert (near & lines).sum() >= 0.5 * lines.sum()
