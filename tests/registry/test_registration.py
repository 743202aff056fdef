import json

import numpy as np
import pytest
import torch

import prompt_diffusion
from prompt_diffusion.registry import RunTracker, connect, record_metrics, register_model
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.training.config import DropoutConfig, NoiseConfig, SamplingConfig, TrainConfig, TrainResources
from prompt_diffusion.training.encode import EncodeConfig, run_encode, run_encode_text
from prompt_diffusion.training.stage import TrainInputs
from prompt_diffusion.training.train import run_train
from prompt_diffusion.training.world import World


@pytest.fixture(scope="module")
def model(scene_inputs, tiny_base):
    encode = EncodeConfig(base=tiny_base)
    images = {"image": scene_inputs.pairs, **scene_inputs.maps}
    latents = {name: run_encode(encode, ref, scene_inputs.store) for name, ref in images.items()}
    config = TrainConfig(
        base=tiny_base,
        image_to_map_examples={"other_group": 1.0},
        dropout=DropoutConfig(),
        noise=NoiseConfig(prediction_type="v_prediction"),
        stem_channels=(4, 8, 8),
        sampling=SamplingConfig(num_inference_steps=3, guidance_scale=2.0),
        batch_size=2,
        num_steps=1,
    )
    text = run_encode_text(encode, scene_inputs.pairs, scene_inputs.store)
    inputs = TrainInputs(pairs=scene_inputs.pairs, maps=scene_inputs.maps, latents=latents, text=text)
    return run_train(config, inputs, scene_inputs.store, TrainResources(), World())


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return Settings(tracking_uri=f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def registered(model, settings):
    return register_model(model, settings, {"rmse/image_to_depth": 0.5})


def test_the_challenger_is_the_model_that_was_trained(model, settings, registered, tmp_path):
    pipeline = prompt_diffusion.load("models:/prompt-diffusion@challenger", settings)
    same = prompt_diffusion.load(str(open_manifest(model.uri).fetch_folder("pipeline", tmp_path)), settings)
    by_version = prompt_diffusion.load(registered.uri, settings)
    image = np.zeros((32, 32, 3), np.uint8)
    outputs = [
        each(
            "",
            (image, image),
            image,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(0),
            output_type="uint8",
        )
        for each in (pipeline, same, by_version)
    ]
    np.testing.assert_array_equal(outputs[0].images, outputs[1].images)
    np.testing.assert_array_equal(outputs[0].images, outputs[2].images)


def test_the_same_model_is_one_version(model, settings, registered):
    assert register_model(model, settings).version == registered.version
    assert len(connect(settings).search_model_versions("name = 'prompt-diffusion'")) == 1


def test_a_version_carries_fingerprints_digests_and_metrics(model, settings, registered):
    record_metrics(registered, settings, {"rmse/image_to_hed": 0.25})
    version = connect(settings).get_model_version(registered.name, registered.version)
    assert version.tags["fingerprint"] == model.fingerprint
    identity = open_manifest(model.uri).identity
    for role, fingerprint in identity.inputs.items():
        assert version.tags[f"input.{role}"] == fingerprint
    assert version.tags["metric.rmse/image_to_hed"] == "0.25"
    assert connect(settings).get_run(registered.run_id).data.metrics["rmse/image_to_depth"] == 0.5


def test_registration_first_delivers_what_the_training_could_not(model, settings):
    away = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:1"})
    identity = open_manifest(model.uri).identity
    with RunTracker(away, "joint", identity) as tracker:
        tracker.log_event({"step": 1, "num_steps": 1, "loss": 0.5, "losses": {"image_to_hed": 0.5}})
        tracker.finish(model, limit_seconds=0.1)
    assert tracker.outbox.path.exists()
    run_id = register_model(model, settings).run_id
    assert not tracker.outbox.path.exists()
    run = connect(settings).get_run(run_id)
    assert run.data.tags["fingerprint"] == model.fingerprint
    assert [(p.step, p.value) for p in connect(settings).get_metric_history(run_id, "loss")] == [(1, 0.5)]
    assert {"grid.png", "losses.parquet", "model"} <= {
        file.path for file in connect(settings).list_artifacts(run_id)
    }


def test_an_altered_file_is_refused_by_name(model, settings, registered):
    version = connect(settings).get_model_version(registered.name, registered.version)
    from pathlib import Path
    from urllib.parse import urlparse

    folder = Path(urlparse(version.source).path) / "pipeline"
    weights = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    original = weights.read_bytes()
    try:
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"was altered: controlnet/diffusion_pytorch_model\.safetensors"):
            prompt_diffusion.load(registered.uri, settings)
    finally:
        weights.write_bytes(original)
    listing = folder / "digests.json"
    text = listing.read_bytes()
    try:
        listing.write_text(json.dumps({}))
        with pytest.raises(ValueError, match=r"was altered: digests\.json"):
            prompt_diffusion.load(registered.uri, settings)
    finally:
        listing.write_bytes(text)


@pytest.mark.parametrize(
    "reference", ["models:/prompt-diffusion@nobody", "models:/prompt-diffusion/99", "models:/other@challenger"]
)
def test_a_reference_that_leads_nowhere_is_one_sentence(settings, registered, reference):
    with pytest.raises(ValueError, match="there is no registered model") as caught:
        prompt_diffusion.load(reference, settings)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(settings):
    with pytest.raises(ValueError, match="neither a folder nor a registered model"):
        prompt_diffusion.load("/no/such/folder", settings)
