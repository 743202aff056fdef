import numpy as np
import pytest

from prompt_diffusion.data.dataset import Dataset, InContextData
from prompt_diffusion.data.families import encode_colors
from prompt_diffusion.data.held_out import BACKGROUND
from prompt_diffusion.evaluation.coverage import choose_covering_rows, find_class_colors, find_distractions
from prompt_diffusion.evaluation.generate import open_data


@pytest.fixture(scope="module")
def data(dataset: Dataset) -> InContextData:
    return open_data(dataset, "test")


def list_classes(data: InContextData, row: int, side: str) -> set[int]:
    codes, counts = np.unique(encode_colors(data.image(row, side, "seg")), return_counts=True)  # type: ignore[arg-type]
    return {int(code) for code, count in zip(codes, counts, strict=True) if count >= 0.005 * counts.sum()}


def test_an_example_covers_the_query_where_any_other_scene_does_and_else_most_of_it(data: InContextData) -> None:
    rows = range(data.num_rows)
    choices = choose_covering_rows(data, 0, rows)
    shown = [list_classes(data, row, "input") for row in rows]
    for row, choice in zip(rows, choices, strict=True):
        wanted = list_classes(data, row, "edited")
        missing = {other: len(wanted - shown[other]) for other in rows if data.group_ids[other] != data.group_ids[row]}
        assert choice.row in missing
        assert missing[choice.row] == min(missing.values())
        assert choice.is_covering is (missing[choice.row] == 0)
    assert {choice.is_covering for choice in choices} >= {True}


def test_the_choice_is_a_function_of_seed_and_sample(data: InContextData) -> None:
    choices = choose_covering_rows(data, 0, range(data.num_rows))
    assert choose_covering_rows(data, 0, [3, 1]) == [choices[3], choices[1]]
    assert any(choose_covering_rows(data, seed, range(data.num_rows)) != choices for seed in (1, 2))


def test_a_distraction_has_the_query_objects_color_on_another_class(data: InContextData) -> None:
    found = find_distractions(data, 0, range(data.num_rows))
    assert found == find_distractions(data, 0, range(data.num_rows))
    assert found, "some query of the fixture has one"
    background = set(encode_colors(BACKGROUND).tolist())
    for each in found:
        query, example = (
            find_class_colors(data, each.query_row, "edited"),
            find_class_colors(data, each.example_row, "input"),
        )
        assert query.keys() <= example.keys()
        assert each.class_code != each.distractor_code
        assert not {each.class_code, each.distractor_code} & background
        assert np.linalg.norm(query[each.class_code] - example[each.distractor_code]) < 40
        assert np.linalg.norm(query[each.class_code] - example[each.class_code]) > 80
        assert data.group_ids[each.query_row] != data.group_ids[each.example_row]
