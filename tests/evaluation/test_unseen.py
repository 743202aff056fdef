import json
from dataclasses import replace

import numpy as np
import pytest

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.held_out import HELD_OUT
from prompt_diffusion.evaluation import generate_unseen
from prompt_diffusion.evaluation.config import EvaluateResources
from prompt_diffusion.evaluation.generate import open_data
from prompt_diffusion.evaluation.generate_unseen import GenerateUnseen, UnseenConfig, check_unseen, read_unseen
from prompt_diffusion.evaluation.rmse import compute_rmse
from prompt_diffusion.evaluation.unseen import MeasureUnseen, measure_case, measure_switch, read_unseen_result
from prompt_diffusion.evaluation.unseen_answers import TRIVIAL, answer_trivially, judge_pixels
from prompt_diffusion.evaluation.unseen_cases import CASES, CaseQuery, CaseRows
from prompt_diffusion.evaluation.unseen_table import render_unseen
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.stage import Context, obtain

PALETTES = ("new_palette", "switched_palette")


@pytest.fixture(scope="module")
def scenes(dataset: Dataset, store: str) -> Dataset:
    """The scenes with their normals."""
    config = AnnotateConfig(condition="normal", annotator="exact")
    normal = obtain(Annotate(config, dataset.pairs), Context(store, AnnotateResources()))
    return dataset.model_copy(update={"maps": {**dataset.maps, "normal": normal}})


@pytest.fixture(scope="module")
def queries(scenes: Dataset) -> dict[str, list[CaseQuery]]:
    rows = CaseRows(open_data(scenes, "test"), seed=0)
    return {name: rows.build(case, range(12)) for name, case in CASES.items()}


def test_every_case_can_be_built_and_asks_what_no_photograph_answers(queries: dict[str, list[CaseQuery]]) -> None:
    assert set(HELD_OUT) < set(queries)
    for name, case in queries.items():
        assert len(case) == 12 or name == "distracting_palette"
        for query in case:
            assert query.truth.shape == query.query.shape == (32, 32, 3)
            assert (query.truth != query.query).any()


def test_the_function_is_the_same_for_example_and_query(queries: dict[str, list[CaseQuery]]) -> None:
    for query in queries["new_palette"]:
        colors = {}
        for shown, answer in ((query.known["seg"][0], query.example_target), (query.known["seg"][1], query.truth)):
            for key, value in zip(shown.reshape(-1, 3).tolist(), answer.reshape(-1, 3).tolist(), strict=True):
                assert colors.setdefault(tuple(key), value) == value
    for query in queries["negative"]:
        np.testing.assert_array_equal(query.example_target, 255 - query.example_source)
        np.testing.assert_array_equal(query.truth, 255 - query.query)


def test_a_switched_palette_changes_the_pair_and_nothing_that_is_asked_about(
    queries: dict[str, list[CaseQuery]],
) -> None:
    for one, other in zip(*(queries[name] for name in PALETTES), strict=True):
        np.testing.assert_array_equal(one.query, other.query)
        np.testing.assert_array_equal(one.example_source, other.example_source)
        assert (one.example_target != other.example_target).any(axis=2).mean() > 0.9


def test_a_misaligned_pair_keeps_the_truth_and_moves_the_examples_target(queries: dict[str, list[CaseQuery]]) -> None:
    for name in ("shifted_depth", "mirrored_depth", "cropped_depth", "other_scene_depth"):
        for query in queries[name]:
            np.testing.assert_array_equal(query.truth, query.known["depth"][1])
            assert (query.example_target != query.known["depth"][0]).any()


def test_trivial_answers_are_what_one_computes_by_hand(queries: dict[str, list[CaseQuery]]) -> None:
    query = queries["negative"][0]
    answers = answer_trivially(query)
    assert tuple(answers) == TRIVIAL
    np.testing.assert_array_equal(answers["copy"], query.example_target)
    assert np.unique(answers["mean"].reshape(-1, 3), axis=0).shape == (1, 3)
    assert np.abs(answers["mean"][0, 0] - query.example_target.mean(axis=(0, 1))).max() <= 0.5
    np.testing.assert_array_equal(answers["fitted"], query.truth)  # a negative is an affine change of colours
    plain = replace(query, example_target=query.known["depth"][0])
    np.testing.assert_array_equal(answer_trivially(plain)["nearest"], query.known["depth"][1])


def test_a_perfect_answer_is_right_everywhere_and_one_of_another_palette_is_not(
    queries: dict[str, list[CaseQuery]],
) -> None:
    asked, other = (queries[name] for name in PALETTES)
    truths, others = (np.stack([query.truth for query in case]) for case in (asked, other))
    noisy = (
        (truths.astype(int) + np.random.default_rng(0).integers(-20, 21, truths.shape)).clip(0, 255).astype(np.uint8)
    )
    assert judge_pixels(asked, truths).all()
    assert judge_pixels(asked, noisy).all()  # a new palette's colours are 80 apart
    num_objects = sum(int(query.judged.sum()) for query in asked)
    assert judge_pixels(asked, others).shape == (num_objects,)
    assert judge_pixels(asked, others).mean() < 0.6
    result = measure_case("new_palette", asked, noisy, truths)
    assert (result.answers["model"].right, result.answers["floor"].rmse) == (1.0, 0.0)
    assert result.answers["model"].rmse == pytest.approx(compute_rmse(noisy, truths))
    assert result.is_better
    stubborn = {"new_palette": judge_pixels(asked, truths), "switched_palette": judge_pixels(other, truths)}
    reading = {"new_palette": judge_pixels(asked, truths), "switched_palette": judge_pixels(other, others)}
    assert measure_switch(reading) == 1.0
    assert measure_switch(stubborn) == pytest.approx(stubborn["switched_palette"].mean())
    assert measure_switch({"new_palette": stubborn["new_palette"]}) is None


def test_a_distraction_is_judged_on_the_object_that_it_concerns(queries: dict[str, list[CaseQuery]]) -> None:
    assert 0 < len(queries["distracting_palette"]) <= 12
    for query in queries["distracting_palette"]:
        assert query.is_covering
        assert len(np.unique(query.truth[query.judged], axis=0)) == 1


def test_it_runs_on_a_model_and_not_again(
    joint: ManifestRef, scenes: Dataset, resources: EvaluateResources, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (*PALETTES, "normals", "negative")
    config = UnseenConfig(cases=cases, num_samples=3, num_inference_steps=1)
    generate = GenerateUnseen(config, joint, scenes)
    generations = obtain(generate, Context(store, resources))
    stage = MeasureUnseen(config, generations, joint, scenes)
    ref = obtain(stage, Context(store, resources))
    result = read_unseen_result(ref)
    assert [case.name for case in result.cases] == list(cases)
    assert {case.n for case in result.cases} == {3}
    assert result.switched is not None
    outputs = read_unseen(generations)["normals"].images
    truths = np.stack([query.truth for query in config.build_queries(scenes, "normals")])
    [normals] = [case for case in result.cases if case.name == "normals"]
    assert normals.answers["model"].rmse == pytest.approx(compute_rmse(outputs, truths))
    assert normals.answers["model"].right is None
    assert normals.answers["floor"].rmse > 0
    assert json.loads(open_manifest(ref.uri).read_file("unseen.json"))["cases"][0]["group"] == "new_draw"
    table = render_unseen(result)
    assert "| normals | family never seen | 3 |" in table
    assert "of 3 held-out families." in table
    monkeypatch.setattr(generate_unseen, "open_pipeline", None)
    assert obtain(generate, Context(store, resources)) == generations
    with pytest.raises(ValueError, match="answers other cases or queries"):
        obtain(
            MeasureUnseen(config.model_copy(update={"num_samples": 2}), generations, joint, scenes),
            Context(store, resources),
        )


def test_every_field_moves_the_fingerprint(joint: ManifestRef, scenes: Dataset) -> None:
    config = UnseenConfig()
    changes = {
        "cases": ("canny",),
        "num_samples": 5,
        "draw": "group",
        "seed": 3,
        "num_inference_steps": 9,
        "split": "train",
    }
    assert set(changes) == set(UnseenConfig.model_fields)
    configs = [config, *(config.model_copy(update={name: value}) for name, value in changes.items())]
    assert len({GenerateUnseen(each, joint, scenes).identity.fingerprint for each in configs}) == len(configs)


def test_a_model_trained_on_a_family_is_refused(store: str) -> None:
    identity = StageIdentity(stage="train", version=1, config={"vision_tasks": ["image_to_normal"]}, inputs=())
    model = seal_manifest(identity, store, [write_file(identity, store, "config.json", b"{}")], counts={"rows": 1})
    with pytest.raises(ValueError, match="'normals' is not unseen to a model trained on maps of normal: leave it out"):
        check_unseen(model, ["negative", "normals"])
    check_unseen(model, ["negative", "canny", "shifted_depth"])


def test_a_dataset_without_the_maps_and_an_unknown_case_are_refused(dataset: Dataset, joint: ManifestRef) -> None:
    with pytest.raises(ValueError, match="there are no maps of condition 'normal'"):
        GenerateUnseen(UnseenConfig(), joint, dataset).identify()
    with pytest.raises(ValueError, match="unknown case 'sepia': choose from new_palette, "):
        UnseenConfig(cases=("sepia",))
