import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation import generate
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources
from prompt_diffusion.evaluation.generate import (
    Generate,
    GenerateConfig,
    build_generate_config,
    choose_example_rows,
    choose_query_rows,
    compute_image_seed,
    open_data,
    read_generations,
)
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.stage import Context, obtain


@pytest.fixture
def depth(config: EvaluateConfig) -> GenerateConfig:
    return build_generate_config(config, "Prompt Diffusion", "image_to_depth")


def test_an_image_depends_on_its_own_seed_alone(
    depth: GenerateConfig,
    joint: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    tmp_store: str,
) -> None:
    """Other batches, and a run over fewer rows, give the same images up to the last bit of a convolution's sum."""
    whole = read_generations(obtain(Generate(depth, joint, dataset), Context(tmp_store, resources))).images
    one_by_one = resources.model_copy(update={"batch_size": 1})
    few = depth.model_copy(update={"num_samples": 3})
    first = read_generations(obtain(Generate(few, joint, dataset), Context(tmp_store, one_by_one))).images
    assert np.abs(whole[:3].astype(int) - first).max() <= 1
    # The images do differ from one another, and from what another seed gives.
    assert len({image.tobytes() for image in whole}) == len(whole)
    other = few.model_copy(update={"seed": 1})
    assert not np.allclose(
        read_generations(obtain(Generate(other, joint, dataset), Context(tmp_store, one_by_one))).images,
        first,
        atol=8,
    )


def test_a_rerun_generates_nothing(
    depth: GenerateConfig,
    joint: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = obtain(Generate(depth, joint, dataset), Context(store, resources))
    monkeypatch.setattr(generate, "open_pipeline", None)
    assert obtain(Generate(depth, joint, dataset), Context(store, resources)) == first
    assert first.rows == depth.num_samples


def test_rows_are_the_splits_in_order_with_their_seeds(
    depth: GenerateConfig, joint: ManifestRef, dataset: Dataset, resources: EvaluateResources, store: str
) -> None:
    table = open_manifest(obtain(Generate(depth, joint, dataset), Context(store, resources)).uri).read_table()
    sample_ids = open_data(dataset, "test").sample_ids[:10]
    assert table["sample_id"].to_pylist() == sample_ids
    assert table["seed"].to_pylist() == [compute_image_seed(depth, sample_id) for sample_id in sample_ids]
    assert set(table["vision_task"].to_pylist()) == {"image_to_depth"}


def test_the_example_pair_and_the_text_reach_the_model(
    depth: GenerateConfig,
    joint: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    tmp_store: str,
) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"example_policy": None},
        {"example_policy": "same_row"},
        {"use_text": False},
        {"prompt_suffix": ", a red cube"},
    ]
    few = depth.model_copy(update={"num_samples": 2})
    images = [
        read_generations(
            obtain(
                Generate(few.model_copy(update=variant), joint, dataset),
                Context(tmp_store, resources),
            )
        ).images.tobytes()
        for variant in variants
    ]
    assert len(set(images)) == len(variants)


def test_more_samples_than_rows_are_refused(
    depth: GenerateConfig, joint: ManifestRef, dataset: Dataset, resources: EvaluateResources, store: str
) -> None:
    too_many = depth.model_copy(update={"num_samples": 13})
    with pytest.raises(ValueError, match="13 samples are asked for, and the test split has 12 rows"):
        obtain(Generate(too_many, joint, dataset), Context(store, resources))


def test_queries_drawn_by_group_are_one_row_each_of_the_first_groups(scene_inputs: Any) -> None:
    data = open_data(Dataset(pairs=scene_inputs.pairs, maps=scene_inputs.maps), "train")
    config = GenerateConfig(
        vision_task="image_to_depth",
        num_samples=10,
        draw="group",
        num_inference_steps=1,
        guidance_scale=1.0,
        example_policy=None,
    )
    rows = choose_query_rows(data, config)
    first = list(dict.fromkeys(data.group_ids))[:10]
    assert [data.group_ids[row] for row in rows] == first
    assert max(Counter(data.group_ids).values()) == 2  # else rows and groups were the same
    draws = [choose_query_rows(data, config.model_copy(update={"seed": seed})) for seed in range(20)]
    assert choose_query_rows(data, config) == draws[0]
    assert {len({draw[place] for draw in draws}) for place in range(10)} == {2}
    assert choose_query_rows(data, config.model_copy(update={"draw": "row"})) == list(range(10))
    with pytest.raises(ValueError, match="13 samples are asked for, and the train split has 12 prompt groups"):
        choose_query_rows(data, config.model_copy(update={"num_samples": 13}))


def test_seeds_are_a_function_of_seed_vision_task_and_sample(depth: GenerateConfig) -> None:
    seed = compute_image_seed(depth, "000001-0")
    assert seed == 1928381390191220078  # golden: a change moves every image of every benchmark
    assert 0 <= seed < 2**63
    others = [
        compute_image_seed(depth, "000002-0"),
        compute_image_seed(depth.model_copy(update={"seed": 1}), "000001-0"),
        compute_image_seed(depth.model_copy(update={"vision_task": "image_to_hed"}), "000001-0"),
    ]
    assert len({seed, *others}) == 4


def test_shared_noise_leaves_the_vision_task_out_of_the_seed(depth: GenerateConfig) -> None:
    shared = depth.model_copy(update={"is_noise_shared": True})
    hed = shared.model_copy(update={"vision_task": "image_to_hed"})
    assert compute_image_seed(shared, "000001-0") == compute_image_seed(hed, "000001-0")


def test_a_querys_example_is_another_scene_and_the_same_for_every_vision_task(dataset: Dataset) -> None:
    data = open_data(dataset, "test")
    rows = choose_example_rows(data, "other_group", 0, range(12))
    assert all(data.group_ids[example] != data.group_ids[row] for row, example in enumerate(rows))
    assert choose_example_rows(data, "other_group", 0, [7]) == [rows[7]]
    assert choose_example_rows(data, "other_group", 1, range(12)) != rows


def test_every_field_moves_the_fingerprint(
    depth: GenerateConfig, joint: ManifestRef, baseline: ManifestRef, dataset: Dataset
) -> None:
    changes: dict[str, Any] = {
        "vision_task": "image_to_hed",
        "num_samples": 11,
        "draw": "group",
        "seed": 1,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "example_policy": None,
        "use_text": False,
        "is_noise_shared": True,
        "prompt_suffix": "!",
        "negative_prompt": "bad",
        "split": "validation",
    }
    assert set(changes) == set(GenerateConfig.model_fields)
    configs = [depth, *(depth.model_copy(update={name: value}) for name, value in changes.items())]
    fingerprints = {Generate(config, joint, dataset).identity.fingerprint for config in configs}
    fingerprints.add(Generate(depth, baseline, dataset).identity.fingerprint)
    assert len(fingerprints) == len(configs) + 1


def replace_map(dataset: Dataset, condition: str) -> Dataset:
    return Dataset(pairs=dataset.pairs, maps={**dataset.maps, condition: dataset.maps["seg"]})


def test_only_the_vision_tasks_own_maps_count(depth: GenerateConfig, joint: ManifestRef, dataset: Dataset) -> None:
    fingerprint = Generate(depth, joint, dataset).identity.fingerprint
    assert Generate(depth, joint, replace_map(dataset, "hed")).identity.fingerprint == fingerprint
    assert Generate(depth, joint, replace_map(dataset, "depth")).identity.fingerprint != fingerprint
    with pytest.raises(ValueError, match="no maps of condition 'depth', only of hed"):
        Generate(depth, joint, Dataset(pairs=dataset.pairs, maps={"hed": dataset.maps["hed"]})).identify()


def test_a_baseline_is_shown_no_pair_and_directions_have_their_own_guidance(config: EvaluateConfig) -> None:
    assert build_generate_config(config, "CN(FT)", "image_to_depth").example_policy is None
    assert build_generate_config(config, "Prompt Diffusion", "image_to_depth").guidance_scale == 1.0
    assert build_generate_config(config, "Prompt Diffusion", "depth_to_image").guidance_scale == 2.0


def test_planning_an_evaluation_imports_no_torch() -> None:
    modules = ["config", "generate", "cells", "in_context", "trivial", "table", "benchmark", "features", "report"]
    lines = [f"import prompt_diffusion.evaluation.{module}" for module in modules]
    heavy = "[m for m in ('torch', 'diffusers', 'transformers', 'matplotlib') if m in sys.modules]"
    code = "\n".join(["import sys", *lines, f"print({heavy})"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
