"""A small real world for the evaluation: ray-cast scenes, their maps, and models that are real but untrained."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.evaluation.config import EvaluateConfig, EvaluateResources
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.vision_tasks import VISION_TASKS


def build_pipeline(seed: int, *, has_example_stem: bool) -> PromptDiffusionPipeline:
    base = load_base("demo-base")
    torch.manual_seed(seed)
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, (8, 16, 32), example_pair=has_example_stem)
    for parameter in controlnet.parameters():
        if not parameter.any():  # zero convolutions: without weights no condition would change an image
            torch.nn.init.normal_(parameter, std=0.05)
    return PromptDiffusionPipeline.from_parts(base, controlnet)


def seal_model(store: str, folder: Path, method: str, vision_tasks: list[str]) -> ManifestRef:
    """Seal an untrained model as the stage "train" does, with losses that fall."""
    config: dict[str, Any] = {"method": method, "vision_tasks": vision_tasks}
    identity = StageIdentity(stage="train", version=1, config=config, inputs=())
    build_pipeline(0, has_example_stem=method == "prompt_diffusion").save_pretrained(folder, safe_serialization=True)
    rows = [(step, task, 1.0 / (1 + step), 4) for step in range(50) for task in vision_tasks]
    columns = {"step": pa.int32(), "vision_task": pa.string(), "loss": pa.float32(), "num_samples": pa.int32()}
    arrays = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), columns.values(), strict=True)]
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays, names=list(columns)), sink)
    files = write_folder(identity, store, "pipeline", folder)
    files += [
        write_file(identity, store, path, data)
        for path, data in (("losses.parquet", sink.getvalue()), ("config.json", json.dumps(config).encode()))
    ]
    return seal_manifest(identity, store, files, counts={"rows": len(rows)})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def store(folder: Path) -> str:
    return str(folder / "store")


@pytest.fixture(scope="session")
def dataset(store: str) -> Dataset:
    scenes = IngestConfig(source=ScenesConfig(num_groups=30), image_size=32, split_fractions=(0.2, 0.4, 0.4))
    pairs = obtain(Ingest(scenes), Context(store, None))
    maps = {
        name: obtain(Annotate(AnnotateConfig(condition=name), pairs), Context(store, AnnotateResources()))
        for name in ("depth", "hed", "seg")
    }
    return Dataset(pairs=pairs, maps=maps)


@pytest.fixture(scope="session")
def joint(folder: Path, store: str) -> ManifestRef:
    return seal_model(store, folder / "joint", "prompt_diffusion", list(VISION_TASKS))


@pytest.fixture(scope="session")
def baseline(folder: Path, store: str) -> ManifestRef:
    """One for all vision tasks: a baseline is trained for one, but here none is trained."""
    return seal_model(store, folder / "baseline", "controlnet", list(VISION_TASKS))


@pytest.fixture(scope="session")
def config() -> EvaluateConfig:
    return EvaluateConfig(
        num_samples=10,
        num_in_context=4,
        map_to_image_num_inference_steps=2,
        image_to_map_num_inference_steps=2,
        map_to_image_guidance_scale=2.0,
        image_to_map_guidance_scale=1.0,
        example_policy="other_group",
        prompt_suffix="",
        negative_prompt="",
    )


@pytest.fixture(scope="session")
def resources(folder: Path) -> EvaluateResources:
    return EvaluateResources(cache_dir=folder / "cache", batch_size=4, num_threads=1)
