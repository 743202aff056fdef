from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation import cells
from prompt_diffusion.evaluation.cells import (
    PAPER_VALUES,
    CellConfig,
    MeasureCell,
    build_cell_config,
    find_floor_split,
    read_cell,
    read_truths,
)
from prompt_diffusion.evaluation.config import METHODS, EvaluateConfig, EvaluateResources
from prompt_diffusion.evaluation.features import build_extractor
from prompt_diffusion.evaluation.frechet import compute_frechet_distance
from prompt_diffusion.evaluation.generate import (
    Generate,
    build_generate_config,
    open_data,
    read_generations,
)
from prompt_diffusion.evaluation.rmse import compute_rmse
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sharded import run_sharded_stage
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.vision_tasks import VISION_TASKS


def test_a_frechet_cell_is_the_distance_to_the_truths_with_a_real_floor(
    config: EvaluateConfig, joint: ManifestRef, dataset: Dataset, resources: EvaluateResources, store: str
) -> None:
    generate_config = build_generate_config(config, "Prompt Diffusion", "seg_to_image")
    generations = obtain(Generate(generate_config, joint, dataset), Context(store, resources))
    cell_config = build_cell_config("Prompt Diffusion", "seg_to_image", "efficientnet_lite0")
    cell = read_cell(obtain(MeasureCell(cell_config, generations, joint, dataset), Context(store, resources)))
    extract = build_extractor("efficientnet_lite0").extract
    truths, others = (
        extract(
            read_truths(
                dataset,
                split,
                None,
                open_data(dataset, split).sample_ids[:10],
            )
        )
        for split in ("test", "validation")
    )
    assert cell.value == pytest.approx(compute_frechet_distance(extract(read_generations(generations).images), truths))
    assert cell.floor == pytest.approx(compute_frechet_distance(others, truths))
    assert (cell.metric, cell.extractor, cell.n, cell.paper) == ("frechet_distance", "efficientnet_lite0", 10, 19.46)
    assert 0 < cell.floor < cell.value, "an untrained model is no better than another set of real images"


def test_an_rmse_cell_is_the_error_of_the_maps_with_the_vaes_floor(
    config: EvaluateConfig,
    baseline: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
) -> None:
    generate_config = build_generate_config(config, "CN(FT)", "image_to_hed")
    generations = obtain(Generate(generate_config, baseline, dataset), Context(store, resources))
    cell_config = build_cell_config("CN(FT)", "image_to_hed", "efficientnet_lite0")
    cell = read_cell(obtain(MeasureCell(cell_config, generations, baseline, dataset), Context(store, resources)))
    truths = read_truths(
        dataset,
        "test",
        "hed",
        open_data(dataset, "test").sample_ids[:10],
    )
    assert cell.value == pytest.approx(compute_rmse(read_generations(generations).images, truths))
    assert (cell.metric, cell.extractor, cell.paper) == ("rmse", None, 0.18)
    assert 0 < cell.floor < cell.value


def reseal(generations: ManifestRef, store: str, change: Callable[[pa.Table], pa.Table]) -> ManifestRef:
    """Seal the same images once more, their rows changed."""
    manifest = open_manifest(generations.uri)
    identity = manifest.identity.model_copy(update={"version": 99})
    table = change(manifest.read_table())
    return run_sharded_stage(identity, store, 1, lambda index: (table, []))


def test_images_and_truths_meet_by_sample_whatever_the_order_of_the_rows(
    config: EvaluateConfig,
    baseline: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
    tmp_store: str,
) -> None:
    generate_config = build_generate_config(config, "CN(FT)", "image_to_hed")
    generations = obtain(Generate(generate_config, baseline, dataset), Context(store, resources))
    shuffled = reseal(generations, tmp_store, lambda table: table.take(list(range(10))[::-1]))
    cell_config = build_cell_config("CN(FT)", "image_to_hed", "efficientnet_lite0")
    values = [
        read_cell(obtain(MeasureCell(cell_config, images, baseline, dataset), Context(tmp_store, resources))).value
        for images in (generations, shuffled)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(
    ("position", "name", "message"),
    [
        (3, "nobody", r"the test split of .* has no sample 'nobody'"),
        (3, None, r"has several images of the sample '"),
    ],
)
def test_an_image_of_no_sample_and_a_second_one_of_a_sample_are_refused_by_name(
    position: int,
    name: str | None,
    message: str,
    config: EvaluateConfig,
    baseline: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
    tmp_store: str,
) -> None:
    def rename(table: pa.Table) -> pa.Table:
        ids = table["sample_id"].to_pylist()
        ids[position] = ids[0] if name is None else name
        return table.set_column(0, "sample_id", pa.array(ids))

    generate_config = build_generate_config(config, "CN(FT)", "image_to_hed")
    generations = obtain(Generate(generate_config, baseline, dataset), Context(store, resources))
    cell_config = build_cell_config("CN(FT)", "image_to_hed", "efficientnet_lite0")
    wrong = reseal(generations, tmp_store, rename)
    with pytest.raises(ValueError, match=message):
        obtain(MeasureCell(cell_config, wrong, baseline, dataset), Context(tmp_store, resources))


def test_a_rerun_of_a_cell_measures_nothing(
    config: EvaluateConfig,
    baseline: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate_config = build_generate_config(config, "CN(FT)", "image_to_hed")
    generations = obtain(Generate(generate_config, baseline, dataset), Context(store, resources))
    cell_config = build_cell_config("CN(FT)", "image_to_hed", "efficientnet_lite0")
    first = obtain(MeasureCell(cell_config, generations, baseline, dataset), Context(store, resources))
    monkeypatch.setattr(cells, "read_generations", None)
    assert obtain(MeasureCell(cell_config, generations, baseline, dataset), Context(store, resources)) == first


def test_images_of_another_vision_task_or_model_are_refused(
    config: EvaluateConfig,
    joint: ManifestRef,
    baseline: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
) -> None:
    generate_config = build_generate_config(config, "Prompt Diffusion", "seg_to_image")
    generations = obtain(Generate(generate_config, joint, dataset), Context(store, resources))
    cell_config = build_cell_config("Prompt Diffusion", "image_to_seg", "efficientnet_lite0")
    with pytest.raises(ValueError, match="image_to_seg cannot be made from images of seg_to_image"):
        obtain(MeasureCell(cell_config, generations, joint, dataset), Context(store, resources))
    same_task = build_cell_config("Prompt Diffusion", "seg_to_image", "efficientnet_lite0")
    with pytest.raises(ValueError, match=f"with the model {joint.fingerprint}, not {baseline.fingerprint}"):
        obtain(MeasureCell(same_task, generations, baseline, dataset), Context(store, resources))


@pytest.mark.parametrize(("extractor", "metric"), [("efficientnet_lite0", "FID"), ("inception", "frechet_distance")])
def test_only_inception_makes_an_fid(extractor: str, metric: str) -> None:
    with pytest.raises(ValidationError, match="is not called"):
        CellConfig.model_validate(
            {"method": "CN(FT)", "vision_task": "seg_to_image", "metric": metric, "extractor": extractor}
        )
    right = build_cell_config("CN(FT)", "seg_to_image", "inception")
    assert right.metric == "FID"


def test_the_extractor_moves_the_fingerprint_of_frechet_cells_alone(joint: ManifestRef, dataset: Dataset) -> None:
    def identify(vision_task: str, extractor: str) -> str:
        assert extractor in ("efficientnet_lite0", "inception")
        cell_config = build_cell_config("CN(FT)", vision_task, extractor)  # type: ignore[arg-type]
        return MeasureCell(cell_config, joint, joint, dataset).identity.fingerprint

    assert identify("seg_to_image", "inception") != identify("seg_to_image", "efficientnet_lite0")
    assert identify("image_to_seg", "inception") == identify("image_to_seg", "efficientnet_lite0")


def test_the_floor_comes_from_another_split_with_enough_rows(dataset: Dataset) -> None:
    assert find_floor_split(dataset.pairs, "test", 10) == "validation"
    assert find_floor_split(dataset.pairs, "validation", 6) == "train"
    with pytest.raises(ValueError, match="the 13 images"):
        find_floor_split(dataset.pairs, "test", 13)


def test_the_paper_has_a_number_for_every_cell() -> None:
    assert set(PAPER_VALUES) == {(method, task) for method in METHODS for task in VISION_TASKS}
    assert PAPER_VALUES["Prompt Diffusion", "depth_to_image"] == 18.60


def test_truths_are_the_edited_side(dataset: Dataset) -> None:
    data = open_data(dataset, "test")
    truths = read_truths(
        dataset,
        "test",
        "depth",
        open_data(dataset, "test").sample_ids[:3],
    )
    np.testing.assert_array_equal(truths[2], data.image(2, "edited", "depth"))
