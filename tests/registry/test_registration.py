"""A model becomes one version, which says what it is and where it came from."""

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch

import prompt_diffusion
from prompt_diffusion.engine.events import ValidationEvent
from prompt_diffusion.registry import (
    ModelFacts,
    RunTracker,
    connect,
    fetch,
    list_versions,
    record_evaluation,
    record_metrics,
    register_folder,
    register_model,
    set_alias,
)
from prompt_diffusion.registry.card import MAX_DESCRIPTION, render_card, render_description
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder

FACTS = ModelFacts(
    title="A checkpoint",
    source="made | for a test",
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    licences={"base": "CreativeML OpenRAIL-M", "code": "unknown"},
    notes="It knows nothing.",
)


def artifact_of(registered, settings):
    """Return the folder of a version's artifact."""
    version = connect(settings).get_model_version(registered.name, registered.version)
    return Path(urlparse(version.source).path)


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
    for role, fingerprint in identity.digests.items():
        assert version.tags[f"input.{role}"] == fingerprint
    assert version.tags["metric.rmse/image_to_hed"] == "0.25"
    assert connect(settings).get_run(registered.run_id).data.metrics["rmse/image_to_depth"] == 0.5


def test_a_trainings_card_says_what_it_learnt_from_what_under_which_licences(model, settings, registered):
    artifact = artifact_of(registered, settings)
    record_metrics(registered, settings, {"rmse/image_to_seg": 0.125})
    card = (artifact / "pipeline" / "README.md").read_text()
    described = connect(settings).get_model_version(registered.name, registered.version).description
    identity = open_manifest(model.uri).identity
    for text in (card, described):
        assert f'prompt_diffusion.load("{registered.uri}")' in text
        assert "| image to seg | RMSE of the map, RGB in [0, 1] | 0.125 |" in text
        assert "depth to image, hed to image, seg to image" in text
        assert "scenes, 40 rows, 32 pixels" in text
        assert "| base | unknown |" in text  # a folder of somebody's
        assert "| dataset | Apache-2.0 (drawn by this project's code) |" in text
        assert "of no use for photographs" in text
        for fingerprint in identity.digests.values():
            assert fingerprint[:32] in text
    assert card.startswith("---\nlicense: unknown\nlibrary_name: diffusers\n")
    assert "| num_steps | 1 |" in card
    assert "/tmp/" not in card  # no folder of this machine
    facts = ModelFacts.model_validate_json((artifact / "facts.json").read_bytes())
    assert facts.configuration == identity.config


def test_a_training_that_went_on_from_a_registered_model_names_it_and_takes_its_licences_over(
    settings, pipeline_folder, train_one_step
):
    first = register_folder(pipeline_folder, settings, name="first", facts=FACTS)
    base = str(fetch(first.uri, settings))
    trained = train_one_step(base, controlnet="base", vision_tasks=("image_to_depth",))
    register_model(trained, settings.model_copy(update={"registered_model": "second"}))
    (summary,) = list_versions(settings, "second")
    assert summary.licences["base"] == FACTS.licences["base"]
    assert summary.licences["base's code"] == FACTS.licences["code"]
    assert summary.licences["dataset"].startswith("Apache-2.0")
    assert summary.vision_tasks == ("image_to_depth",)
    assert f"base: {first.uri}." in connect(settings).get_model_version("second", "1").description


def test_measuring_a_model_again_leaves_the_aliases_where_they_are(
    model, settings, registered, train_one_step, tiny_base
):
    newer = register_model(train_one_step(tiny_base, seed=1), settings)
    assert (newer.alias, newer.previous) == ("challenger", registered.version)
    (measured,) = (m for m in record_evaluation(model, settings, {"rmse/image_to_depth": 0.5}) if m.name == newer.name)
    assert measured == registered.model_copy(update={"alias": None})
    aliases = {version.version: version.aliases for version in list_versions(settings, "prompt-diffusion")}
    assert aliases == {newer.version: ("challenger",), registered.version: ()}
    connect(settings).delete_model_version(newer.name, newer.version)
    set_alias(registered.uri, "challenger", settings)


def test_a_training_in_a_store_far_away_is_registered_and_what_cannot_be_found_there_is_unknown(
    model, settings, registered, s3_store
):
    sealed = open_manifest(model.uri)
    folder = Path(model.uri)
    files = write_folder(sealed.identity, s3_store, "pipeline", folder / "pipeline")
    files.append(write_file(sealed.identity, s3_store, "config.json", (folder / "config.json").read_bytes()))
    far = seal_manifest(sealed.identity, s3_store, files, counts=sealed.counts)
    # the image pairs and maps were not copied there
    second = register_model(far, settings.model_copy(update={"registered_model": "far"}))
    (summary,) = list_versions(settings, "far")
    assert summary.licences["dataset"] == "unknown"
    assert summary.licences["annotator maps/depth"] == "unknown"
    digests = [
        connect(settings).get_model_version(v.name, v.version).tags["digests_sha256"] for v in (registered, second)
    ]
    assert digests[0] == digests[1]


def test_a_card_has_what_hubs_read_and_fits_into_mlflows_database():
    card = render_card(FACTS, "models:/x/1", {})
    front = card.split("---")[1]
    for line in ("license: creativeml-openrail-m", 'base_model: "stable-diffusion-v1-5/stable-diffusion-v1-5"'):
        assert line in front.splitlines()
    assert "Nothing has been measured" in card
    long = FACTS.model_copy(update={"configuration": {f"field_{n}": "x" * 40 for n in range(200)}})
    assert "field_199" in render_card(long, "models:/x/1", {})
    assert len(render_description(long, "models:/x/1", {})) <= MAX_DESCRIPTION
    longer = long.model_copy(update={"datasets": {f"pairs-{n}": "0" * 32 for n in range(200)}})
    description = render_description(longer, "models:/x/1", {})
    assert len(description) <= MAX_DESCRIPTION
    assert description.rstrip().endswith("beside the model.")


def test_a_folder_is_one_version_however_often_and_from_wherever_it_is_registered(settings, pipeline_folder, tmp_path):
    first = register_folder(pipeline_folder, settings, name="imported", facts=FACTS)
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    again = register_folder(copy, settings, name="imported", alias="other", facts=FACTS)
    assert (first.version, first.alias, again.version, again.alias) == ("1", "challenger", "1", "other")
    (summary,) = list_versions(settings, "imported")
    assert summary.aliases == ("challenger", "other")
    assert (summary.title, summary.source, summary.licences) == (FACTS.title, FACTS.source, FACTS.licences)
    weights = copy / "scheduler" / "scheduler_config.json"
    weights.write_text(weights.read_text().replace("0.012", "0.013"))
    assert register_folder(copy, settings, name="imported", facts=FACTS).version == "2"
    assert [version.version for version in list_versions(settings, "imported")] == ["2", "1"]
    pipeline = prompt_diffusion.load("models:/imported/1", settings)
    stored = prompt_diffusion.load(str(pipeline_folder), settings)
    for ours, theirs in zip(pipeline.unet.parameters(), stored.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_the_loader_does_not_read_is_not_registered(settings, pipeline_folder):
    registered = register_folder(pipeline_folder, settings, name="clean", facts=FACTS)
    names = {path.name for path in artifact_of(registered, settings).rglob("*") if path.is_file()}
    assert "diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".ckpt", ".pt"))]
    # the one file of code is three lines that name the installed package
    assert {name for name in names if name.endswith(".py")} == {"model_code.py"}


def test_a_folder_that_lacks_a_part_is_refused_and_leaves_nothing(settings, pipeline_folder, tmp_path):
    broken = shutil.copytree(pipeline_folder, tmp_path / "broken", ignore=shutil.ignore_patterns("controlnet"))
    with pytest.raises(ValueError, match="it has no controlnet with safetensors weights"):
        register_folder(broken, settings, name="broken", facts=FACTS)
    with pytest.raises(ValueError, match="is no folder"):
        register_folder(tmp_path / "nothing", settings, name="broken", facts=FACTS)
    with pytest.raises(ValueError, match="there is no registered model 'broken'"):
        list_versions(settings, "broken")


def test_threads_that_register_the_same_folder_make_one_version(settings, pipeline_folder):
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: register_folder(pipeline_folder, settings, name="race", facts=FACTS), range(3)))
    assert {registered.version for registered in made} == {"1"}
    assert len(list_versions(settings, "race")) == 1
    left = [path.name for path in (settings.cache_dir / "models").iterdir() if path.name.startswith("registering-")]
    assert left == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from prompt_diffusion.registry import ModelFacts, obtain, register_folder
from prompt_diffusion.settings import Settings

obtain.upload = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
settings = Settings(tracking_uri=sys.argv[2], cache_dir=sys.argv[3])
register_folder(Path(sys.argv[1]), settings, name="killed", facts=ModelFacts(title="Half of it"))
"""


def test_a_registration_that_is_killed_leaves_no_version_and_the_next_one_cleans_up(settings, pipeline_folder):
    arguments = [str(pipeline_folder), settings.tracking_uri, str(settings.cache_dir)]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(ValueError, match="there is no registered model 'killed'"):
        list_versions(settings, "killed")
    with pytest.raises(ValueError, match="killed"):
        prompt_diffusion.load("models:/killed@challenger", settings)
    assert list((settings.cache_dir / "models").glob("registering-*"))
    assert register_folder(pipeline_folder, settings, name="killed", facts=FACTS).version == "1"
    assert not list((settings.cache_dir / "models").glob("registering-*"))
    assert prompt_diffusion.load("models:/killed", settings).unet.config.sample_size == 8


def test_a_promoted_version_is_what_the_bare_name_means(settings, pipeline_folder, tmp_path):
    register_folder(pipeline_folder, settings, name="ladder", facts=FACTS)
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    weights = copy / "scheduler" / "scheduler_config.json"
    weights.write_text(weights.read_text().replace("0.012", "0.013"))
    register_folder(copy, settings, name="ladder", facts=FACTS)
    by_challenger = prompt_diffusion.load("models:/ladder", settings)
    assert by_challenger.scheduler.config.beta_end == 0.013
    promoted = set_alias("models:/ladder/1", "champion", settings)
    assert (promoted.version, promoted.alias) == ("1", "champion")
    assert prompt_diffusion.load("models:/ladder", settings).scheduler.config.beta_end == 0.012
    assert prompt_diffusion.load("models:/ladder@challenger", settings).scheduler.config.beta_end == 0.013


def test_a_model_that_was_registered_without_a_server_around_it_still_loads(settings, registered):
    """Versions of before had the pipeline's folder, with its digests, as their whole artifact."""
    client = connect(settings)
    version = client.get_model_version(registered.name, registered.version)
    client.create_registered_model("old")
    tags = {key: version.tags[key] for key in ("digests_sha256", "fingerprint")}
    old = client.create_model_version("old", f"{version.source}/pipeline", version.run_id, tags=tags)
    pipeline = prompt_diffusion.load("models:/old/1", settings)
    assert pipeline.unet.config.sample_size == 8
    summary = list_versions(settings, "old")[0]
    assert (summary.uri, summary.title, summary.metrics) == (f"models:/old/{old.version}", "", {})


def test_registration_first_delivers_what_the_training_could_not(model, settings):
    away = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:1"})
    identity = open_manifest(model.uri).identity
    with RunTracker(away, "joint", identity) as tracker:
        tracker.log_event(ValidationEvent(step=1, num_steps=1, loss=0.5, is_best=True))
        tracker.finish(model, limit_seconds=0.1)
    assert tracker.outbox.path.exists()
    run_id = register_model(model, settings).run_id
    assert not tracker.outbox.path.exists()
    run = connect(settings).get_run(run_id)
    assert run.data.tags["fingerprint"] == model.fingerprint
    assert [(p.step, p.value) for p in connect(settings).get_metric_history(run_id, "validation/loss")] == [(1, 0.5)]
    assert {"grid.png", "losses.parquet", "models"} <= {file.path for file in connect(settings).list_artifacts(run_id)}


def test_a_registry_that_does_not_answer_is_named_before_anything_is_written(settings, pipeline_folder, tmp_path):
    away = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:1", "cache_dir": tmp_path / "cache"})
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:1 does not answer"):
        register_folder(pipeline_folder, away, name="away", facts=FACTS)
    assert not (tmp_path / "cache").exists()


def test_an_artifact_names_no_folder_of_this_machine(settings, registered, model):
    artifact = artifact_of(registered, settings)
    for name in ("MLmodel", "facts.json", "model_code.py", "requirements.txt", "pipeline/README.md"):
        text = (artifact / name).read_text()
        assert str(Path(model.uri).parent) not in text
        assert str(settings.cache_dir) not in text
    assert json.loads((artifact / "pipeline" / "digests.json").read_bytes()).keys() >= {"model_index.json"}
