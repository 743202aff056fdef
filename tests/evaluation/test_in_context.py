import numpy as np
import pytest

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.evaluation import in_context
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources
from prompt_diffusion.evaluation.generate import Generate
from prompt_diffusion.evaluation.in_context import (
    MeasureInContext,
    build_shown_configs,
    count_confusion,
    find_nearest,
    read_in_context,
)
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.stage import Context, obtain

LABELS = ["depth", "hed", "seg", "none"]


def draw_truths(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {label: rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for label in LABELS}


def blur(images: np.ndarray) -> np.ndarray:
    """Move the images a little towards grey, as a poor generator does."""
    return (0.8 * images + 0.2 * 128).astype(np.uint8)


def test_planted_outputs_are_counted_where_they_belong() -> None:
    truths = draw_truths(5)
    outputs = {label: blur(truths[label]) for label in LABELS}
    outputs["hed"][3] = blur(truths["seg"][3])
    outputs["none"][:4] = blur(truths["depth"][:4])
    result = count_confusion(outputs, truths)
    assert result.labels == LABELS
    assert result.confusion == [[5, 0, 0, 0], [0, 4, 1, 0], [0, 0, 5, 0], [4, 0, 0, 1]]
    assert result.accuracy == pytest.approx(14 / 15)  # the row without a pair has no right answer


def test_a_map_of_another_query_is_not_the_map() -> None:
    truths = draw_truths(4)
    shifted = np.roll(truths["depth"], 1, axis=0)
    candidates = {"depth": truths["depth"], "moved": shifted}
    assert find_nearest(shifted, candidates).tolist() == [1, 1, 1, 1]


def test_outputs_and_truths_of_other_names_are_refused() -> None:
    truths = draw_truths(1)
    with pytest.raises(ValueError, match="cannot be counted"):
        count_confusion({"depth": truths["depth"]}, truths)


def test_the_test_shows_pairs_without_text_guidance_or_other_noise(config: EvaluateConfig) -> None:
    shown = build_shown_configs(config)
    assert list(shown) == LABELS
    assert {(c.use_text, c.guidance_scale, c.is_noise_shared, c.num_samples) for c in shown.values()} == {
        (False, 1.0, True, 4)
    }
    assert [c.vision_task for c in shown.values()] == [
        "image_to_depth",
        "image_to_hed",
        "image_to_seg",
        "image_to_depth",
    ]
    assert [c.example_policy for c in shown.values()] == ["other_group"] * 3 + [None]


def test_it_runs_on_a_model_and_not_again(
    config: EvaluateConfig,
    joint: ManifestRef,
    dataset: Dataset,
    resources: EvaluateResources,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = Context(store, resources)
    shown = {
        name: obtain(Generate(each, joint, dataset), context) for name, each in build_shown_configs(config).items()
    }
    stage = MeasureInContext(config.split, shown, dataset)
    ref = obtain(stage, Context(store, None))
    result = read_in_context(ref)
    assert [sum(row) for row in result.confusion] == [4, 4, 4, 4]
    monkeypatch.setattr(in_context, "read_generations", None)
    assert obtain(stage, Context(store, None)) == ref
