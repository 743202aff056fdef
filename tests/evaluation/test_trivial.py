import numpy as np
import pytest

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation.config import EvaluateConfig
from prompt_diffusion.evaluation.generate import choose_example_rows, open_data
from prompt_diffusion.evaluation.trivial import (
    MeasureTrivial,
    build_trivial_config,
    compute_mean_map,
    read_trivial,
)
from prompt_diffusion.store.stage import Context, obtain


def test_trivial_baselines_are_what_one_computes_by_hand(config: EvaluateConfig, dataset: Dataset, store: str) -> None:
    results = read_trivial(obtain(MeasureTrivial(build_trivial_config(config), dataset), Context(store, None)))
    by_name = {(result.baseline, result.vision_task): result.value for result in results}
    assert len(by_name) == len(results) == 9
    test, train = (
        open_data(dataset, "test"),
        open_data(dataset, "train"),
    )
    truths = np.stack([test.image(row, "edited", "seg") for row in range(10)]) / 255.0
    mean = np.mean([train.image(row, "edited", "seg") for row in range(train.num_rows)], axis=0).round() / 255.0
    queries = np.stack([test.image(row, "edited", None) for row in range(10)]) / 255.0
    examples = choose_example_rows(test, "other_group", config.seed, range(10))
    copies = np.stack([test.image(row, "input", "seg") for row in examples]) / 255.0
    for name, answers in {"mean_map": mean, "copy_query": queries, "copy_example_target": copies}.items():
        by_hand = np.sqrt(np.mean((answers - truths) ** 2))
        assert by_name[name, "image_to_seg"] == pytest.approx(by_hand)  # type: ignore[index]


def test_copying_the_example_of_the_same_scene_leaks(config: EvaluateConfig, dataset: Dataset, store: str) -> None:
    """Why the demo shows examples of other scenes: from the same one the answer can be copied."""
    errors = {}
    for policy in ("same_row", "other_group"):
        leaky = build_trivial_config(config).model_copy(update={"example_policy": policy})
        results = read_trivial(obtain(MeasureTrivial(leaky, dataset), Context(store, None)))
        errors[policy] = {r.vision_task: r.value for r in results if r.baseline == "copy_example_target"}
    assert all(errors["same_row"][task] < 0.5 * errors["other_group"][task] for task in errors["same_row"])


def test_the_mean_map_is_rounded_not_cut(dataset: Dataset) -> None:
    train = open_data(dataset, "train")
    exact = np.mean([train.image(row, "edited", "depth") for row in range(train.num_rows)], axis=0)
    assert np.abs(compute_mean_map(train, "depth") - exact).max() <= 0.5


def test_every_field_moves_the_fingerprint(config: EvaluateConfig, dataset: Dataset) -> None:
    trivial = build_trivial_config(config)
    changes = {"num_samples": 3, "draw": "group", "seed": 5, "example_policy": "same_row", "split": "validation"}
    assert set(changes) == set(type(trivial).model_fields)
    configs = [trivial, *(trivial.model_copy(update={name: value}) for name, value in changes.items())]
    assert len({MeasureTrivial(c, dataset).identity.fingerprint for c in configs}) == len(configs)


def test_more_samples_than_rows_are_refused(config: EvaluateConfig, dataset: Dataset, store: str) -> None:
    with pytest.raises(ValueError, match="99 samples are asked for, and the test split has 12 rows"):
        obtain(
            MeasureTrivial(build_trivial_config(config).model_copy(update={"num_samples": 99}), dataset),
            Context(store, None),
        )
