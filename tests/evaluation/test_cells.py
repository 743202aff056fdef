from collections.abc import Mapping

import numpy as np
import pytest
from pydantic import ValidationError

from prompt_diffusion.evaluation import cells
from prompt_diffusion.evaluation.cells import (
    PAPER_VALUES,
    CellConfig,
    build_cell_config,
    find_floor_split,
    identify_cell,
    read_cell,
    read_truths,
    run_cell,
)
from prompt_diffusion.evaluation.config import METHODS, EvalResources, EvaluateConfig
from prompt_diffusion.evaluation.features import build_extractor
from prompt_diffusion.evaluation.frechet import compute_frechet_distance
from prompt_diffusion.evaluation.generate import build_generate_config, read_images, run_generate
from prompt_diffusion.evaluation.rmse import compute_rmse
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.vision_tasks import VISION_TASKS

Maps = Mapping[str, ManifestRef]


def test_a_frechet_cell_is_the_distance_to_the_truths_with_a_real_floor(
    config: EvaluateConfig, joint: ManifestRef, pairs: ManifestRef, maps: Maps, resources: EvalResources, store: str
) -> None:
    generate_config = build_generate_config(config, "Prompt Diffusion", "seg_to_image")
    generations = run_generate(generate_config, joint, pairs, maps, store, resources)
    cell_config = build_cell_config("Prompt Diffusion", "seg_to_image", "efficientnet_lite0")
    cell = read_cell(run_cell(cell_config, generations, joint, pairs, maps, store, resources))
    extract = build_extractor("efficientnet_lite0").extract
    truths, others = (extract(read_truths(pairs, maps, split, None, 10)) for split in ("test", "validation"))
    assert cell.value == pytest.approx(compute_frechet_distance(extract(read_images(generations)), truths))
    assert cell.floor == pytest.approx(compute_frechet_distance(others, truths))
    assert (cell.metric, cell.extractor, cell.n, cell.paper) == ("frechet_distance", "efficientnet_lite0", 10, 19.46)
    assert 0 < cell.floor < cell.value, "an untrained model is no better than another set of real images"


def test_an_rmse_cell_is_the_error_of_the_maps_with_the_vaes_floor(
    config: EvaluateConfig, baseline: ManifestRef, pairs: ManifestRef, maps: Maps, resources: EvalResources, store: str
) -> None:
    generate_config = build_generate_config(config, "CN(FT)", "image_to_hed")
    generations = run_generate(generate_config, baseline, pairs, maps, store, resources)
    cell_config = build_cell_config("CN(FT)", "image_to_hed", "efficientnet_lite0")
    cell = read_cell(run_cell(cell_config, generations, baseline, pairs, maps, store, resources))
    truths = read_truths(pairs, maps, "test", "hed", 10)
    assert cell.value == pytest.approx(compute_rmse(read_images(generations), truths))
    assert (cell.metric, cell.extractor, cell.paper) == ("rmse", None, 0.18)
    assert 0 < cell.floor < cell.value


def test_a_rerun_of_a_cell_measures_nothing(
    config: EvaluateConfig,
    baseline: ManifestRef,
    pairs: ManifestRef,
    maps: Maps,
    resources: EvalResources,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate_config = build_generate_config(config, "CN(FT)", "image_to_hed")
    generations = run_generate(generate_config, baseline, pairs, maps, store, resources)
    cell_config = build_cell_config("CN(FT)", "image_to_hed", "efficientnet_lite0")
    first = run_cell(cell_config, generations, baseline, pairs, maps, store, resources)
    monkeypatch.setattr(cells, "read_images", None)
    assert run_cell(cell_config, generations, baseline, pairs, maps, store, resources) == first


def test_images_of_another_vision_task_or_model_are_refused(
    config: EvaluateConfig,
    joint: ManifestRef,
    baseline: ManifestRef,
    pairs: ManifestRef,
    maps: Maps,
    resources: EvalResources,
    store: str,
) -> None:
    generate_config = build_generate_config(config, "Prompt Diffusion", "seg_to_image")
    generations = run_generate(generate_config, joint, pairs, maps, store, resources)
    cell_config = build_cell_config("Prompt Diffusion", "image_to_seg", "efficientnet_lite0")
    with pytest.raises(ValueError, match="image_to_seg cannot be made from images of seg_to_image"):
        run_cell(cell_config, generations, joint, pairs, maps, store, resources)
    same_task = build_cell_config("Prompt Diffusion", "seg_to_image", "efficientnet_lite0")
    with pytest.raises(ValueError, match=f"with the model {joint.fingerprint}, not {baseline.fingerprint}"):
        run_cell(same_task, generations, baseline, pairs, maps, store, resources)


@pytest.mark.parametrize(("extractor", "metric"), [("efficientnet_lite0", "FID"), ("inception", "frechet_distance")])
def test_only_inception_makes_an_fid(extractor: str, metric: str) -> None:
    with pytest.raises(ValidationError, match="is not called"):
        CellConfig.model_validate(
            {"method": "CN(FT)", "vision_task": "seg_to_image", "metric": metric, "extractor": extractor}
        )
    right = build_cell_config("CN(FT)", "seg_to_image", "inception")
    assert right.metric == "FID"


def test_the_extractor_moves_the_fingerprint_of_frechet_cells_alone(
    joint: ManifestRef, pairs: ManifestRef, maps: Maps
) -> None:
    def identify(vision_task: str, extractor: str) -> str:
        assert extractor in ("efficientnet_lite0", "inception")
        cell_config = build_cell_config("CN(FT)", vision_task, extractor)  # type: ignore[arg-type]
        return identify_cell(cell_config, joint, joint, pairs, maps).fingerprint

    assert identify("seg_to_image", "inception") != identify("seg_to_image", "efficientnet_lite0")
    assert identify("image_to_seg", "inception") == identify("image_to_seg", "efficientnet_lite0")


def test_the_floor_comes_from_another_split_with_enough_rows(pairs: ManifestRef) -> None:
    assert find_floor_split(pairs, "test", 10) == "validation"
    assert find_floor_split(pairs, "validation", 6) == "train"
    with pytest.raises(ValueError, match="the 13 images"):
        find_floor_split(pairs, "test", 13)


def test_the_paper_has_a_number_for_every_cell() -> None:
    assert set(PAPER_VALUES) == {(method, task) for method in METHODS for task in VISION_TASKS}
    assert PAPER_VALUES["Prompt Diffusion", "depth_to_image"] == 18.60


def test_truths_are_the_edited_side(pairs: ManifestRef, maps: Maps) -> None:
    data = cells.open_data(pairs, maps, "test")
    truths = read_truths(pairs, maps, "test", "depth", 3)
    np.testing.assert_array_equal(truths[2], data.image(2, "edited", "depth"))
