import pytest

from prompt_diffusion.vision_tasks import OTHER_VISION_TASKS, VISION_TASKS, VisionTask, find_vision_task


def test_known_vision_tasks_are_found_by_name():
    for name, task in (VISION_TASKS | OTHER_VISION_TASKS).items():
        assert find_vision_task(name) is task


@pytest.mark.parametrize("condition", ["sketch", "my_depth", "style2", "x", "night"])
def test_a_condition_of_the_users_own_has_both_directions_with_the_caption_as_text(condition):
    there, back = f"{condition}_to_image", f"image_to_{condition}"
    assert find_vision_task(there) == VisionTask(there, condition, "map_to_image", None)
    assert find_vision_task(back) == VisionTask(back, condition, "image_to_map", None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dept_to_image", "depth_to_image"),
        ("image_to_depht", "image_to_depth"),
        ("hedd_to_image", "hed_to_image"),
        ("image_to_cany", "image_to_canny"),
        ("scribbles_to_image", "scribble_to_image"),
    ],
)
def test_a_mistyped_known_condition_is_refused_with_the_one_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=f"unknown vision task '{name}': did you mean '{meant}'?"):
        find_vision_task(name)


@pytest.mark.parametrize("name", ["depth", "depth-to-image", "Sketch_to_image", "image_to_image", "", "image_to_"])
def test_what_has_no_vision_tasks_form_is_refused_with_what_has(name):
    with pytest.raises(ValueError, match=r"choose one of depth_to_image, .* CONDITION_to_image or image_to_CONDITION"):
        find_vision_task(name)
