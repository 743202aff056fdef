"""The six vision tasks as data: a condition and a direction; a seventh is one more row, a user's own needs none.

Source: Wang et al., arXiv 2305.01115, section 3 (the six tasks, and the text that goes with each direction).
"""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

Direction = Literal["map_to_image", "image_to_map"]
Draw = Literal["row", "group"]
ExamplePolicy = Literal["same_group", "same_row", "other_group"]


@dataclass(frozen=True, slots=True)
class VisionTask:
    """One vision task: which condition map, and which side of the pair is the map."""

    name: str
    condition: str
    direction: Direction
    text: str | None
    """The fixed prompt of an image-to-map task; None where the caption of the target is the prompt."""

    @property
    def source_condition(self) -> str | None:
        """What the example source and the query show: a condition, or None for the photograph."""
        return self.condition if self.direction == "map_to_image" else None

    @property
    def target_condition(self) -> str | None:
        """What the example target and the target show: a condition, or None for the photograph."""
        return self.condition if self.direction == "image_to_map" else None


VISION_TASKS: dict[str, VisionTask] = {
    task.name: task
    for task in (
        VisionTask("depth_to_image", "depth", "map_to_image", None),
        VisionTask("hed_to_image", "hed", "map_to_image", None),
        VisionTask("seg_to_image", "seg", "map_to_image", None),
        VisionTask("image_to_depth", "depth", "image_to_map", "depth map"),
        VisionTask("image_to_hed", "hed", "image_to_map", "hed map"),
        VisionTask("image_to_seg", "seg", "image_to_map", "segmentation map"),
    )
}

OTHER_VISION_TASKS: dict[str, VisionTask] = {
    task.name: task
    for task in (
        VisionTask("canny_to_image", "canny", "map_to_image", None),
        VisionTask("normal_to_image", "normal", "map_to_image", None),
        VisionTask("scribble_to_image", "scribble", "map_to_image", None),
        VisionTask("image_to_canny", "canny", "image_to_map", "canny map"),
        VisionTask("image_to_normal", "normal", "image_to_map", "normal map"),
    )
}
"""What the paper tries on a model that never trained on it; they can be trained on all the same."""


CONDITION_PATTERN = r"^[a-z][a-z0-9_]*$"
"""What a condition may be called."""
_FORMS: tuple[tuple[str, Direction], ...] = (
    (r"^([a-z][a-z0-9_]*)_to_image$", "map_to_image"),
    (r"^image_to_([a-z][a-z0-9_]*)$", "image_to_map"),
)
_NEARNESS = 0.8  # the similarity of two conditions' names from which one is taken for a mistyped other


def find_vision_task(name: str) -> VisionTask:
    """Return the vision task of that name: a known one, or a user's own, whose text is always the caption of its target.

    ``{condition}_to_image`` and ``image_to_{condition}`` name the vision tasks of a condition of the user's own, of which there
    must be condition maps. ValueError for a name of another form, and for a condition that looks like a mistyped known one.
    """
    known = VISION_TASKS | OTHER_VISION_TASKS
    if name in known:
        return known[name]
    for form, direction in _FORMS:
        match = re.match(form, name)
        if match is None or match[1] == "image":  # what the photograph is called
            continue
        condition = match[1]
        conditions = {task.condition: task.name for task in known.values() if task.direction == direction}
        near = difflib.get_close_matches(condition, conditions, n=1, cutoff=_NEARNESS)
        if near:
            raise ValueError(f"unknown vision task {name!r}: did you mean {conditions[near[0]]!r}?")
        return VisionTask(name, condition, direction, None)
    raise ValueError(
        f"unknown vision task {name!r}: choose one of {', '.join(known)}, or for a condition of your own "
        "CONDITION_to_image or image_to_CONDITION"
    )
