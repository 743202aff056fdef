import numpy as np
import pytest

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.data.dataset import InContextData
from prompt_diffusion.data.ingest import Ingest
from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.vision_tasks import VISION_TASKS


@pytest.fixture(scope="module")
def data(scene_inputs):
    maps = {name: open_manifest(ref.uri) for name, ref in scene_inputs.maps.items()}
    return InContextData(open_manifest(scene_inputs.pairs.uri), maps, "train")


def test_splits_share_no_prompt_group(scene_inputs):
    pairs = open_manifest(scene_inputs.pairs.uri)
    groups = [set(InContextData(pairs, {}, split).group_ids) for split in ("train", "validation", "test")]
    assert [len(g) for g in groups] == [12, 4, 4]
    assert len(set.union(*groups)) == 20


@pytest.mark.parametrize("task", VISION_TASKS.values(), ids=lambda task: task.name)
def test_golden_of_each_vision_task(data, task):
    """Which side is the map, which twin each picture comes from, and the channel order, against the renderer itself."""
    query_row, example_row = 0, 5  # rows 0 and 1 are the two pairs of prompt group 0, rows 4 and 5 of group 2
    sample = data.assemble(task, query_row, example_row)
    query, example = build_scene_pair(0, 0, 32, pair=0), build_scene_pair(0, 2, 32, pair=1)

    def render(view, condition):
        if condition is None:
            return view.image
        picture = view.maps[condition]
        return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)

    np.testing.assert_array_equal(sample.example_source, render(example.input, task.source_condition))
    np.testing.assert_array_equal(sample.example_target, render(example.input, task.target_condition))
    np.testing.assert_array_equal(sample.query, render(query.edited, task.source_condition))
    np.testing.assert_array_equal(sample.target, render(query.edited, task.target_condition))
    expected = {"depth": "depth map", "hed": "hed map", "seg": "segmentation map"}[task.condition]
    assert sample.prompt == (query.edited_prompt if task.direction == "map_to_image" else expected)


def test_example_policies_choose_from_where_they_say(data):
    for row in range(data.num_rows):
        for draw in range(5):
            generator = sample_generator(draw, row)
            assert data.choose_example("same_row", row, generator) == row
            assert data.group_ids[data.choose_example("same_group", row, generator)] == data.group_ids[row]
            assert data.group_ids[data.choose_example("other_group", row, generator)] != data.group_ids[row]


def test_other_group_reaches_every_row_of_the_other_groups(data):
    generator = sample_generator(0, 0)
    reached = {data.choose_example("other_group", 3, generator) for _ in range(1000)}
    assert reached == {row for row in range(data.num_rows) if data.group_ids[row] != data.group_ids[3]}


def test_maps_that_are_not_aligned_are_refused(scene_inputs, tmp_path):
    from prompt_diffusion.annotators.base import AnnotateResources
    from prompt_diffusion.annotators.config import AnnotateConfig
    from prompt_diffusion.data.ingest import IngestConfig
    from prompt_diffusion.data.sources.scenes import ScenesConfig

    store = str(tmp_path)
    other = obtain(Ingest(IngestConfig(source=ScenesConfig(num_groups=3), image_size=32)), Context(store, None))
    depth = obtain(Annotate(AnnotateConfig(condition="depth"), other), Context(store, AnnotateResources()))
    with pytest.raises(ValueError, match=r"is not aligned with .*: it was made of other pairs"):
        InContextData(open_manifest(scene_inputs.pairs.uri), {"depth": open_manifest(depth.uri)}, "train")


def test_a_condition_that_was_not_annotated_is_named(data):
    with pytest.raises(ValueError, match="no condition maps 'normal' here: there are depth, hed, seg"):
        data.image(0, "edited", "normal")
