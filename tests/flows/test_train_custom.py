"""A user's own vision task, as docs/custom-tasks.md tells: a folder of pairs, a registered model, a generated image."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prompt_diffusion
from flows.run import start_run
from flows.train import build_custom_overrides, prepare_custom_inputs, train_custom, train_six_task, use_pairs
from prompt_diffusion.data.ingest import IngestConfig, build_source
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.storage import list_files
from prompt_diffusion.training.rows import open_training_data
from prompt_diffusion.training.samples import draw_sample
from prompt_diffusion.training.stage import Train
from prompt_diffusion.training.train import run_train

pytestmark = pytest.mark.usefixtures("in_process")

FAST = {"resources.train.device_batch_size": 6, "resources.train.validate_every_steps": None}


def write_pairs(folder, count, columns=("source_file_name", "target_file_name", "caption"), crop=None):
    """Write pairs of a sketch (the scene's edges) and its picture, with the table that lists them."""
    folder.mkdir()
    source = build_source(IngestConfig(source=ScenesConfig(num_groups=count, seed=7), image_size=64))
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for number, pair in enumerate(source.read(source.plan())):
            names = (f"{number:03d}-sketch.png", f"{number:03d}.png")
            for name, data in zip(names, (pair.exact_maps["hed"][0], pair.input_image), strict=True):
                (folder / name).write_bytes(data)
            table.writerow([*names, pair.input_prompt])
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("own") / "pairs", 40)


def test_a_folder_of_pairs_becomes_a_registered_model_that_goes_on_from_another(
    pairs, copy_smoke_inputs, tmp_path, monkeypatch
):
    monkeypatch.setenv("PROMPT_DIFFUSION_REGISTERED_MODEL", "custom-test")
    store = copy_smoke_inputs(tmp_path / "store")
    joint = train_six_task("smoke", FAST | {"train.num_steps": 1}, store)
    start = "models:/custom-test/1"
    ref = train_custom(str(pairs), "sketch", model=start, steps=2, preset="smoke", overrides=FAST, store=store)
    manifest, before = open_manifest(ref.uri), open_manifest(joint.uri)
    assert manifest.identity.config["vision_tasks"] == ["sketch_to_image"]
    assert set(manifest.identity.digests) == {"base", "controlnet", "pairs", "text", "maps/sketch", "latents/image"}
    assert not {"base", "controlnet"} & set(manifest.identity.config)
    assert str(tmp_path) not in manifest.identity.model_dump_json()

    # it goes on from the joint model's weights: after two steps of a warm-up they have hardly moved
    own = prompt_diffusion.load("models:/custom-test-sketch/1")
    joint_model = prompt_diffusion.load(start)
    trained = before.counts["steps"]
    assert (trained, manifest.counts["steps"]) == (1, 2)
    ours, theirs = own.controlnet.state_dict(), joint_model.controlnet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(np.abs((ours[name] - theirs[name]).numpy()).max() < 0.05 for name in ours)
    image = np.zeros((64, 64, 3), np.uint8)
    out = own("", (image, image), image, guidance_scale=1.0, num_inference_steps=1, output_type="uint8").images
    assert out.shape == (1, 64, 64, 3)

    # the same again is looked up, and the six-task model is still what the next one would go on from
    assert train_custom(str(pairs), "sketch", model=start, steps=2, preset="smoke", overrides=FAST, store=store) == ref
    # the model's VAE is the base's own, so latents serve both
    from_base = train_custom(str(pairs), "sketch", model=None, steps=1, preset="smoke", overrides=FAST, store=store)
    assert open_manifest(from_base.uri).identity.digests["latents/image"] == manifest.identity.digests["latents/image"]
    assert "controlnet" not in open_manifest(from_base.uri).identity.digests


def test_mixed_reads_each_vision_task_from_the_dataset_that_has_its_maps(pairs, tmp_path):
    small = FAST | {"ingest.source.num_groups": 20}
    run = start_run("smoke", build_custom_overrides("sketch", True, None, 1) | small, str(tmp_path / "store"))
    inputs = prepare_custom_inputs(run, str(pairs), "sketch", mixed=True).narrow(run.config.train.vision_tasks)
    six, own = inputs.datasets
    assert sorted(six.maps) == ["depth", "hed", "seg"]
    assert (sorted(own.maps), sorted(own.latents)) == (["sketch"], ["image"])
    assert (six.pairs.rows, own.pairs.rows) == (20, 40)
    roles = Train(run.config.train, inputs).identity.digests
    assert roles["dataset-2/maps/sketch"] == own.maps["sketch"].fingerprint
    assert open_manifest(own.pairs.uri).identity.config["image_size"] == 64

    # every sample comes from the dataset of its vision task, and a step of all seven can be taken
    data = open_training_data(run.config.train, inputs, ShardCache(tmp_path / "cache"), "train")
    for draw in (draw_sample(run.config.train, data, index) for index in range(60)):
        of = own if draw.vision_task.name == "sketch_to_image" else six
        assert draw.data.rows.pairs.ref == of.pairs
    recipe = run.config.train.model_copy(update={"batch_size": 14})
    ref = run_train(Train(recipe, inputs), run.store, TrainResources(validate_every_steps=None), World())
    losses = pq.read_table(pa.BufferReader(open_manifest(ref.uri).read_file("losses.parquet")))
    assert "sketch_to_image" in losses["vision_task"].to_pylist()
    assert sum(losses["num_samples"].to_pylist()) == 14


@pytest.mark.parametrize(
    ("count", "columns", "sentence"),
    [
        (
            9,
            ("source_file_name", "target_file_name", "caption"),
            r"^9 pairs are too few: 8 of their groups are for training, .* and 0 for",
        ),
        (
            2,
            ("source", "target", "caption"),
            r"has no columns source_file_name, target_file_name; it has caption, source, ",
        ),
    ],
)
def test_a_folder_that_will_not_do_is_refused_in_one_sentence(count, columns, sentence, tmp_path):
    folder = write_pairs(tmp_path / "pairs", count, columns)
    with pytest.raises(ValueError, match=sentence) as caught:
        train_custom(str(folder), "sketch", model=None, preset="smoke", overrides=FAST, store=str(tmp_path / "store"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"condition": "dept"}, "unknown vision task 'dept_to_image': did you mean 'depth_to_image'"),
        ({"condition": "my sketch"}, "unknown vision task 'my sketch_to_image'"),
        ({"condition": "hed", "mixed": True}, "the condition 'hed' is one of the six vision tasks' own"),
        ({"condition": "sketch", "model": "models:/nobody@challenger"}, "there is no registered model 'models:/nobody"),
        ({"condition": "sketch", "folder": "nowhere"}, "nowhere needs one table out of metadata.csv"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_is_made(arguments, sentence, pairs, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(ValueError, match=sentence) as caught:
        train_custom(**{"folder": str(pairs), "model": None, "preset": "smoke", "store": str(store)} | arguments)
    assert "\n" not in str(caught.value)
    assert list_files(str(store)) == []


def test_a_users_own_columns_are_said_by_an_override(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 2, columns=("before", "image", "text"))
    columns = {"source_column": "before", "target_column": "image", "caption_column": "text"}
    source = {"kind": "image_folder", "uri": "elsewhere", **columns}
    run = use_pairs(start_run("smoke", {"ingest.source": source}, str(tmp_path / "store")), str(folder), "sketch")
    found = run.config.ingest.source
    assert (found.uri, found.condition) == (str(folder), "sketch")
    assert [key.sample_id for key in build_source(run.config.ingest).plan()] == ["000.png", "001.png"]


def test_a_users_own_columns_are_said_beside_the_presets_dataset(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 2, columns=("before", "image", "text"))
    columns = {"source_column": "before", "target_column": "image", "caption_column": "text"}
    run = start_run("smoke", {}, str(tmp_path / "store"))
    assert run.config.ingest.source.kind == "scenes"
    found = use_pairs(run, str(folder), "sketch", columns).config.ingest
    assert [key.sample_id for key in build_source(found).plan()] == ["000.png", "001.png"]
    with pytest.raises(ValueError, match=r"^reading: caption: Extra inputs are not permitted, got 'text'$"):
        use_pairs(run, str(folder), "sketch", {"caption": "text"})
