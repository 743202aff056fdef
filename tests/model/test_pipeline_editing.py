"""Edits are plain calls: by text through a condition map, and by an example of before and after."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def stacks(draw_images):
    return draw_images(2)


def test_an_edit_by_text_is_the_published_two_steps(pipeline, stacks, seeded):
    photo, its_map, picture = stacks
    edited = pipeline.edit(
        picture, "a clear sky", example_pair=(photo, its_map), generator=seeded(1, 2), output_type="uint8"
    )
    generators = seeded(1, 2)
    maps = pipeline("depth map", (photo, its_map), picture, generator=generators, output_type="uint8").images
    images = pipeline("a clear sky", (its_map, photo), maps, generator=generators, output_type="uint8").images
    np.testing.assert_array_equal(edited.maps, maps)
    np.testing.assert_array_equal(edited.images, images)
    assert not np.array_equal(maps, images)


def test_the_condition_decides_the_first_text(pipeline, stacks, seeded):
    picture = stacks[2][0]
    for condition, text in (("hed", "hed map"), ("seg", "segmentation map"), ("thermal", "")):
        edited = pipeline.edit(
            picture,
            "a clear sky",
            condition=condition,
            generator=seeded(1),
            output_type="uint8",
            map_guidance_scale=1.0,
        )
        first = pipeline(text, None, picture, generator=seeded(1), guidance_scale=1.0, output_type="uint8").images
        np.testing.assert_array_equal(edited.maps, first)
    with pytest.raises(ValueError, match="did you mean 'image_to_depth'"):
        pipeline.edit(picture, "a clear sky", condition="dept")


def test_the_map_has_its_own_steps_and_guidance_where_they_are_given(pipeline, stacks, seeded):
    picture = stacks[2][0]
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale))
        return tensors

    options = {"generator": seeded(1), "callback_on_step_end": watch}
    pipeline.edit(picture, "a clear sky", num_inference_steps=2, guidance_scale=3.0, **options)
    assert set(seen) == {(2, 3.0)}
    seen.clear()
    pipeline.edit(picture, "a clear sky", map_num_inference_steps=1, map_guidance_scale=1.0, **options)
    assert seen == [(1, 1.0)] + [(3, 2.0)] * 3


def test_several_images_share_the_map_of_their_picture(pipeline, stacks, seeded):
    edited = pipeline.edit(
        stacks[2],
        ["a clear sky", "a red cube"],
        num_images_per_prompt=2,
        generator=seeded(1, 2, 3, 4),
        output_type="pt",
    )
    assert edited.images.shape == (4, 3, 32, 32)
    assert edited.maps.shape == (2, 3, 32, 32)
    assert not torch.equal(edited.images[0], edited.images[1])
    kinds = pipeline.edit(Image.fromarray(stacks[2][0]), "a clear sky")
    assert {type(kinds.images[0]), type(kinds.maps[0])} == {Image.Image}


def test_a_list_of_pairs_is_reversed_pair_by_pair(pipeline, stacks, seeded):
    photo, its_map, picture = stacks

    def edit(example_pair):
        return pipeline.edit(
            picture[0], "a clear sky", example_pair=example_pair, generator=seeded(1), output_type="uint8"
        )

    pairs = [(photo[i], its_map[i]) for i in range(2)]
    np.testing.assert_array_equal(edit(pairs).images, edit(pairs[::-1]).images)
    assert not np.array_equal(edit(pairs).images, edit([pair[::-1] for pair in pairs]).images)


def test_an_edit_by_example_is_a_plain_call_with_before_and_after(pipeline, stacks, seeded):
    before, after, picture = stacks
    edited = pipeline.edit_by_example(picture, before, after, generator=seeded(1, 2), output_type="uint8").images
    plain = pipeline("", (before, after), picture, generator=seeded(1, 2), output_type="uint8").images
    np.testing.assert_array_equal(edited, plain)
    told = pipeline.edit_by_example(picture, before, after, "a red cube", generator=seeded(1, 2), output_type="uint8")
    assert not np.array_equal(told.images, plain)
