"""No training draws what is held out: by name, and by function."""

import numpy as np
import pytest

from prompt_diffusion.data.augmentation import AUGMENTATIONS, draw_target_function
from prompt_diffusion.data.families import FAMILIES
from prompt_diffusion.data.held_out import (
    BACKGROUND,
    HELD_OUT,
    MISALIGNMENTS,
    OBJECTS,
    build_probe,
    resembles_held_out,
)
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.sources.scene_renderer import PALETTE
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.vision_tasks import VISION_TASKS


@pytest.fixture(scope="module")
def scene():
    """A scene that members and draws are compared on, another than the probe."""
    view = build_scene_pair(5, 6, 24).edited
    return {"image": view.image, **view.maps}


def test_no_name_is_a_trained_one():
    trained = {*AUGMENTATIONS, *FAMILIES, *VISION_TASKS, *(task.condition for task in VISION_TASKS.values())}
    assert not trained & set(HELD_OUT)


def test_every_member_would_be_refused_as_a_draw():
    for name, family in HELD_OUT.items():
        for number in range(family.num_members):
            assert resembles_held_out(family.build(number)), (name, number)


@pytest.mark.parametrize("picture", ["image", "depth", "hed", "seg"])
def test_the_trained_vision_tasks_are_no_members(picture):
    assert not resembles_held_out(lambda pictures: pictures[picture])


@pytest.mark.parametrize("family", AUGMENTATIONS)
def test_no_draw_is_a_member_on_another_scene_either(family, scene):
    members = np.stack(
        [each.build(number)(scene) for each in HELD_OUT.values() for number in range(each.num_members)]
    ).astype(np.float32)
    for index in range(40):
        drawn = draw_target_function(family, sample_generator(11, index))(scene).astype(np.float32)
        assert np.abs(members - drawn).mean(axis=(1, 2, 3)).min() > 0.5, index


@pytest.mark.parametrize("name", [name for name, family in HELD_OUT.items() if family.num_members > 1])
def test_members_are_fixed_and_differ(name, scene):
    family = HELD_OUT[name]
    shown = [family.member(number)(scene) for number in range(6)]
    np.testing.assert_array_equal(shown[0], family.member(family.num_members)(scene))
    for one in range(6):
        for other in range(one):
            assert (shown[one] != shown[other]).any() or name == "class_recolored"  # the scene may lack both classes


def test_a_new_palettes_classes_can_be_told_apart():
    for number in range(8):
        colors = HELD_OUT["new_palette"].member(number)({"seg": PALETTE[None]})[0].astype(float)
        distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)
        assert distances[~np.eye(6, dtype=bool)].min() >= 80


def test_the_probe_shows_every_class():
    found = np.unique(build_probe()["seg"].reshape(-1, 3), axis=0)
    np.testing.assert_array_equal(found, np.unique(PALETTE, axis=0))


def test_members_are_what_their_names_say(scene):
    shown = {name: family.member(0)(scene) for name, family in HELD_OUT.items()}
    np.testing.assert_array_equal(shown["inverted_depth"], 255 - scene["depth"])
    np.testing.assert_array_equal(shown["negative"], 255 - scene["image"])
    np.testing.assert_array_equal(shown["normals"], scene["normal"])
    np.testing.assert_array_equal(shown["blue_edges_on_yellow"][scene["hed"][..., 0] == 0][:1], [[255, 220, 0]])
    is_background = (scene["seg"][:, :, None] == BACKGROUND).all(axis=3).any(axis=2)
    np.testing.assert_array_equal(shown["object_mask"][..., 0], np.where(is_background, 0, 255))
    for number, color in enumerate(OBJECTS):
        is_changed = (HELD_OUT["class_recolored"].member(number)(scene) != scene["image"]).any(axis=2)
        assert not is_changed[(scene["seg"] != color).any(axis=2)].any()


def test_a_misaligned_target_is_the_target_moved(scene):
    depth = scene["depth"]
    np.testing.assert_array_equal(MISALIGNMENTS["mirrored"](depth), depth[:, ::-1])
    np.testing.assert_array_equal(MISALIGNMENTS["shifted"](depth)[3:, 3:], depth[:-3, :-3])
    assert np.abs(MISALIGNMENTS["cropped"](depth).astype(int) - depth).mean() > 2
