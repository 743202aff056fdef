import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest

from prompt_diffusion.data.sources.ray_caster import SHAPES
from prompt_diffusion.data.sources.scene_renderer import CLASSES, COLORS, FLOORS, PALETTE, SKIES
from prompt_diffusion.data.sources.scenes import (
    ScenePair,
    ScenesConfig,
    ScenesSource,
    build_scene_pair,
    describe_scene,
    mirror_caption,
)
from prompt_diffusion.data.transforms import Pixels, decode_image

SIDES = ("input", "edited")


@pytest.fixture(scope="module")
def pairs() -> list[ScenePair]:
    return [build_scene_pair(0, index, 64) for index in range(60)]


def count_classes(segmentation: Pixels) -> dict[str, int]:
    matches = (segmentation[:, :, None] == PALETTE).all(axis=3)
    assert matches.any(axis=2).all(), "every pixel has a colour of the palette"
    return dict(zip(CLASSES, matches.sum(axis=(0, 1)).tolist(), strict=True))


def test_the_same_scene_is_rendered_alike_for_good() -> None:
    pair = build_scene_pair(0, 3, 32)
    arrays = [pair.input.image, pair.edited.image, *(pair.edited.maps[name] for name in ("depth", "hed", "seg"))]
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16] == "fa7977b7fc240592"


def test_index_seed_and_pair_each_make_another_scene() -> None:
    images = [
        build_scene_pair(*arguments).input.image.tobytes()
        for arguments in ((0, 0, 32), (1, 0, 32), (0, 1, 32), (0, 0, 32, 1))
    ]
    assert len(set(images)) == 4


def test_pairs_of_a_group_share_their_texts_and_not_their_layout() -> None:
    first, second = (build_scene_pair(0, 5, 32, pair) for pair in (0, 1))
    assert (first.input_prompt, first.edit_instruction) == (second.input_prompt, second.edit_instruction)
    assert first.edited_prompt == second.edited_prompt
    assert not np.array_equal(first.input.maps["depth"], second.input.maps["depth"])


def test_near_is_bright_and_the_range_is_full(pairs: list[ScenePair]) -> None:
    for pair in pairs:
        depth = pair.input.maps["depth"]
        assert (depth.min(), depth.max()) == (0, 255)
        is_sky = (pair.input.maps["seg"] == PALETTE[CLASSES.index("sky")]).all(axis=2)
        is_floor = (pair.input.maps["seg"] == PALETTE[CLASSES.index("floor")]).all(axis=2)
        assert np.median(depth[is_sky]) == 0  # pixels on a border are averages
        column = depth[:, 0, 0][is_floor[:, 0]].astype(int)
        assert (np.diff(column) >= 0).all(), "the floor comes nearer from the horizon down"


def test_a_nearer_object_is_brighter_in_depth(pairs: list[ScenePair]) -> None:
    num_compared = 0
    for pair in pairs:
        objects = pair.input_scene.objects
        if len({item.shape for item in objects}) < len(objects) or len(objects) < 2:
            continue
        means = [
            pair.input.maps["depth"][(pair.input.maps["seg"] == PALETTE[CLASSES.index(item.shape)]).all(axis=2)].mean()
            for item in objects
        ]
        nearest, farthest = (pick(range(len(objects)), key=lambda i: objects[i].z) for pick in (min, max))
        if objects[farthest].z - objects[nearest].z > 1.0:
            num_compared += 1
            assert means[nearest] > means[farthest]
    assert num_compared > 5


@pytest.mark.parametrize("side", SIDES)
def test_masks_agree_with_captions(pairs: list[ScenePair], side: str) -> None:
    for pair in pairs:
        counts = count_classes(getattr(pair, side).maps["seg"])
        caption = getattr(pair, f"{side}_prompt")
        for shape in SHAPES:
            assert (counts[shape] >= 0.01 * 64 * 64) == (shape in caption), caption
        assert counts["sky"] > 0
        assert counts["floor"] > 0


@pytest.mark.parametrize("side", SIDES)
def test_captions_list_the_objects_from_left_to_right(pairs: list[ScenePair], side: str) -> None:
    num_ordered = 0
    for pair in pairs:
        shapes = re.findall("|".join(SHAPES), getattr(pair, f"{side}_prompt"))
        if len(set(shapes)) < len(shapes):
            continue
        segmentation = getattr(pair, side).maps["seg"]
        middles = []
        for shape in shapes:
            columns = np.nonzero((segmentation == PALETTE[CLASSES.index(shape)]).all(axis=2))[1]
            middles.append((columns.min() + columns.max()) / 2)
        assert middles == sorted(middles)
        num_ordered += len(shapes) > 1
    assert num_ordered > 5


def test_an_edited_colour_is_seen_where_its_object_stands(pairs: list[ScenePair]) -> None:
    num_checked = 0
    for pair in pairs:
        for before, after in zip(pair.input_scene.objects, pair.edited_scene.objects, strict=True):
            if before.color == after.color or [o.shape for o in pair.input_scene.objects].count(before.shape) > 1:
                continue
            mask = (pair.input.maps["seg"] == PALETTE[CLASSES.index(before.shape)]).all(axis=2)
            moved = pair.edited.image[mask].mean(axis=0) - pair.input.image[mask].mean(axis=0)
            wanted = np.array(COLORS[after.color]) - np.array(COLORS[before.color])
            assert moved @ wanted / (np.linalg.norm(moved) * np.linalg.norm(wanted)) > 0.9
            assert after.color in pair.edited_prompt
            num_checked += 1
    assert num_checked > 5


def test_edges_are_borders_and_not_surfaces(pairs: list[ScenePair]) -> None:
    for pair in pairs:
        hed = pair.input.maps["hed"][:, :, 0]
        classes = pair.input.maps["seg"].astype(int)
        border = np.abs(np.diff(classes, axis=1)).sum(axis=2) > 0
        across = np.maximum(hed[:, :-1], hed[:, 1:])
        assert np.median(across[border]) > 100
        assert np.median(hed) < 20
        assert np.array_equal(pair.input.maps["hed"][:, :, 0], pair.input.maps["hed"][:, :, 2])


def test_floor_normals_all_point_up(pairs: list[ScenePair]) -> None:
    for pair in pairs[:10]:
        inner = pair.input.maps["normal"][-1, :]  # no object reaches the last row
        normals = inner.astype(float) / 127.5 - 1.0
        assert np.allclose(np.linalg.norm(normals, axis=1), 1.0, atol=0.02)
        assert (normals[:, 1] > 0.6).all(), "up in the frame"
        assert np.ptp(inner, axis=0).max() <= 1


def test_an_edit_changes_what_its_instruction_says_and_nothing_else(pairs: list[ScenePair]) -> None:
    kinds = set()
    for pair in pairs:
        changed = [a != b for a, b in zip(pair.input_scene.objects, pair.edited_scene.objects, strict=True)]
        differs = {
            "object": sum(changed),
            "floor": pair.input_scene.floor != pair.edited_scene.floor,
            "sky": pair.input_scene.sky != pair.edited_scene.sky,
        }
        assert sum(differs.values()) == 1, pair.edit_instruction
        assert pair.edit_instruction.split()[-1] in pair.edited_prompt
        assert not np.array_equal(pair.input.image, pair.edited.image)
        is_shape = pair.edit_instruction.startswith("turn")
        assert np.array_equal(pair.input.maps["seg"], pair.edited.maps["seg"]) != is_shape
        kinds.add("shape" if is_shape else next(name for name, value in differs.items() if value))
    assert kinds == {"shape", "object", "floor", "sky"}


def test_objects_do_not_touch(pairs: list[ScenePair]) -> None:
    for pair in pairs:
        objects = pair.input_scene.objects
        for index, one in enumerate(objects):
            for other in objects[:index]:
                assert np.hypot(one.x - other.x, one.z - other.z) > one.size + other.size


def test_captions_use_a_small_closed_vocabulary(pairs: list[ScenePair]) -> None:
    words = {*COLORS, *FLOORS, *SKIES, *SHAPES, "a", "an", "left", "of", "on", "under", "floor", "sky"}
    for pair in pairs:
        for caption in (pair.input_prompt, pair.edited_prompt):
            assert set(caption.split()) <= words
            assert len(caption.split()) <= 21


def test_the_source_hands_out_what_the_renderer_drew() -> None:
    source = ScenesSource(ScenesConfig(num_groups=2, pairs_per_group=2, seed=7), 32)
    keys = source.plan()
    assert [(key.sample_id, key.group_id, key.seed) for key in keys] == [
        ("000000-0", "000000", 0),
        ("000000-1", "000000", 1),
        ("000001-0", "000001", 0),
        ("000001-1", "000001", 1),
    ]
    (record,) = source.read(keys[3:])
    pair = build_scene_pair(7, 1, 32, 1)
    assert np.array_equal(decode_image(record.edited_image), pair.edited.image)
    for condition in ("depth", "hed", "seg", "normal"):
        of_input, of_edited = record.exact_maps[condition]
        assert np.array_equal(decode_image(of_input), pair.input.maps[condition])
        assert np.array_equal(decode_image(of_edited), pair.edited.maps[condition])


def test_the_mirrored_caption_describes_the_mirrored_scene(pairs: list[ScenePair]) -> None:
    for pair in pairs:
        scene = pair.edited_scene
        mirrored = replace(scene, objects=tuple(replace(item, x=-item.x) for item in reversed(scene.objects)))
        assert mirror_caption(describe_scene(scene)) == describe_scene(mirrored)
        assert mirror_caption(mirror_caption(describe_scene(scene))) == describe_scene(scene)
    with pytest.raises(ValueError, match="a cat on the left"):
        mirror_caption("a cat on the left")
