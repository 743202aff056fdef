"""A registry that people use, too: they delete versions, runs and experiments, rename, copy, and damage artifacts."""

import shutil
from pathlib import Path
from urllib.parse import urlparse

import pytest
from mlflow.exceptions import MlflowException

import prompt_diffusion
from prompt_diffusion.registry import (
    ModelFacts,
    connect,
    describe_registration,
    fetch,
    list_versions,
    record_evaluation,
    record_metrics,
    register_folder,
    register_model,
)

FACTS = ModelFacts(title="A pipeline with random weights")
METRICS = {"rmse/image_to_depth": 0.25}
WEIGHTS = "pipeline/controlnet/diffusion_pytorch_model.safetensors"


def artifact_of(settings, registered):
    return Path(urlparse(connect(settings).get_model_version_download_uri(registered.name, registered.version)).path)


def aliases_of(settings, name="prompt-diffusion"):
    return connect(settings).get_registered_model(name).aliases


def test_an_evaluation_makes_no_version_and_moves_no_alias(own, model, pipeline_folder):
    assert record_evaluation(model, own, METRICS) == []  # nobody registered it
    first = register_model(model, own)
    newer = register_folder(pipeline_folder, own, facts=FACTS)
    connect(own).delete_model_version(first.name, first.version)
    assert record_evaluation(model, own, METRICS) == []
    assert [version.uri for version in list_versions(own)] == [newer.uri]
    assert {alias: str(number) for alias, number in aliases_of(own).items()} == {"challenger": newer.version}


def test_an_evaluation_adds_its_numbers_to_every_version_of_its_training_wherever_it_went(own, model):
    first = register_model(model, own)
    client = connect(own)
    client.copy_model_version(f"models:/{first.name}/{first.version}", "production")
    client.rename_registered_model(first.name, "renamed")
    recorded = record_evaluation(model, own, METRICS)
    assert {version.uri for version in recorded} == {"models:/renamed/1", "models:/production/1"}
    for version in list_versions(own):
        assert version.metrics == METRICS
        assert f'load("{version.uri}")' in client.get_model_version(version.name, version.version).description
    card = (artifact_of(own, recorded[0]) / "pipeline" / "README.md").read_text()
    assert "models:/renamed/1" in card  # the copy has no files of its own


@pytest.mark.parametrize("gone", ["original version", "original name"])
def test_a_copy_is_loaded_whatever_becomes_of_its_original(own, pipeline_folder, gone):
    first = register_folder(pipeline_folder, own, name="staging", facts=FACTS)
    client = connect(own)
    client.copy_model_version(first.uri, "production")
    if gone == "original version":
        client.delete_model_version(first.name, first.version)
    else:
        client.rename_registered_model("staging", "other")
    assert prompt_diffusion.load("models:/production/1", own).unet.config.sample_size == 8
    copy = first.model_copy(update={"name": "production"})
    record_metrics(copy, own, METRICS)
    (summary,) = list_versions(own, "production")
    assert summary.metrics == METRICS


def test_numbers_of_a_version_whose_run_was_deleted_stand_beside_the_version(own, model):
    registered = register_model(model, own)
    connect(own).delete_run(registered.run_id)
    record_metrics(registered, own, METRICS)
    (summary,) = list_versions(own)
    assert summary.metrics == METRICS
    assert "0.25" in (artifact_of(own, registered) / "pipeline" / "README.md").read_text()
    again = register_model(model, own)
    assert again.version == registered.version


def test_after_its_experiment_was_deleted_a_model_is_registered_in_a_new_one(own, model, pipeline_folder):
    first = register_model(model, own)
    client = connect(own)
    client.delete_experiment(client.get_experiment_by_name("prompt-diffusion").experiment_id)
    assert register_model(model, own, METRICS).version == first.version
    other = register_folder(pipeline_folder, own, facts=FACTS)
    run = client.get_run(other.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "prompt-diffusion-2"
    assert client.get_experiment_by_name("prompt-diffusion").lifecycle_stage == "deleted"  # as the person wished
    assert register_folder(pipeline_folder, own, facts=FACTS).run_id == other.run_id


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES = {
    "weights altered": lambda artifact: flip(artifact / WEIGHTS),
    "weights gone": lambda artifact: (artifact / WEIGHTS).unlink(),
    "listing gone": lambda artifact: (artifact / "pipeline" / "digests.json").unlink(),
    "listing altered": lambda artifact: flip(artifact / "pipeline" / "digests.json"),
    "facts gone": lambda artifact: (artifact / "facts.json").unlink(),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("with_run", [True, False], ids=["run", "run deleted"])
def test_a_damaged_artifact_is_whole_once_the_model_is_registered_again(own, pipeline_folder, damage, with_run):
    registered = register_folder(pipeline_folder, own, facts=FACTS)
    record_metrics(registered, own, METRICS)
    if not with_run:
        connect(own).delete_run(registered.run_id)
    DAMAGES[damage](artifact_of(own, registered))
    again = register_folder(pipeline_folder, own, facts=FACTS)
    assert again.version == registered.version
    fresh = own.model_copy(update={"cache_dir": own.cache_dir.with_name("fresh")})
    assert (fetch(again.uri, fresh) / "unet").is_dir()
    assert "0.25" in (artifact_of(own, registered) / "pipeline" / "README.md").read_text()
    assert (artifact_of(own, registered) / "facts.json").is_file()


def test_without_its_facts_a_version_still_takes_numbers(own, pipeline_folder, caplog):
    registered = register_folder(pipeline_folder, own, facts=FACTS)
    (artifact_of(own, registered) / "facts.json").unlink()
    record_metrics(registered, own, METRICS)
    assert list_versions(own)[0].metrics == METRICS
    assert f"{registered.uri} has lost its facts.json" in caplog.text


def test_a_training_made_again_with_other_weights_is_another_version_and_leaves_the_first_alone(own, model, tmp_path):
    first = register_model(model, own)
    before = artifact_of(own, first)
    # on another machine the same training rounds otherwise: here the version is as if it had been made there
    connect(own).set_model_version_tag(first.name, first.version, "digests_sha256", "0" * 64)
    second = register_model(model, own)
    assert (second.version, second.previous) == ("2", "1")
    assert artifact_of(own, second) != before
    assert fetch(second.uri, own).is_dir()


def test_no_alias_moves_where_none_is_asked_for_and_a_move_is_said(own, model, pipeline_folder):
    silent = register_model(model, own, alias=None)
    assert aliases_of(own) == {}
    assert describe_registration(silent) == "the model is models:/prompt-diffusion/1; no alias was moved to it"
    moved = register_folder(pipeline_folder, own, facts=FACTS)
    assert "now models:/prompt-diffusion@challenger (there was none before)" in describe_registration(moved)
    back = register_model(model, own)
    assert "now models:/prompt-diffusion@challenger (before it was version 2)" in describe_registration(back)
    assert "still models:/prompt-diffusion@challenger" in describe_registration(register_model(model, own))


def test_what_the_registry_refuses_is_one_sentence(own, pipeline_folder):
    with pytest.raises(ValueError, match=r"^the registry at sqlite:///.* refused: ") as caught:
        register_folder(pipeline_folder, own, name="a/b", facts=FACTS)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, MlflowException)
    register_folder(pipeline_folder, own, name="bare", alias=None, facts=FACTS)
    with pytest.raises(ValueError, match="has no alias, the versions 1"):
        fetch("models:/bare@challenger", own)
