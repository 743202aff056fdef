"""What is loaded is what was registered, whatever happened to the copies, the connection or the process meanwhile."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch

import prompt_diffusion
from prompt_diffusion.model.mirror import mirror_base
from prompt_diffusion.registry import ModelFacts, connect, fetch, list_versions, register_folder, set_alias
from prompt_diffusion.registry.cache import complete_copy, digest_listing
from prompt_diffusion.store.fingerprint import compute_digest

FACTS = ModelFacts(title="A pipeline with random weights")
WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def imported(settings, pipeline_folder, tmp_path):
    """A version of its own, a cache of its own, and the folder of its artifact's pipeline."""
    own = settings.model_copy(update={"cache_dir": tmp_path / "cache"})
    registered = register_folder(pipeline_folder, own, name=f"m-{tmp_path.name}", facts=FACTS)
    version = connect(own).get_model_version(registered.name, registered.version)
    return registered, own, Path(urlparse(version.source).path) / "pipeline"


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): compute_digest(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_load_fetches_nothing_and_needs_the_version_alone(imported):
    registered, settings, artifact = imported
    first = fetch(registered.uri, settings)
    before = snapshot(first)
    away = artifact.with_name("away")
    artifact.rename(away)
    try:
        assert fetch(f"models:/{registered.name}@challenger", settings) == first
        assert snapshot(first) == before
        assert prompt_diffusion.load(registered.uri, settings).unet.config.sample_size == 8
        other = settings.model_copy(update={"cache_dir": settings.cache_dir.with_name("other")})
        with pytest.raises(ValueError, match=r"digests\.json is not what was registered \(it is missing\)"):
            fetch(registered.uri, other)
    finally:
        away.rename(artifact)


def test_an_altered_file_is_refused_by_name(imported):
    registered, settings, artifact = imported
    prompt_diffusion.load(registered.uri, settings)
    weights = artifact / WEIGHTS
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"was altered: controlnet/diffusion_pytorch_model\.safetensors") as caught:
        prompt_diffusion.load(registered.uri, settings)
    assert "\n" not in str(caught.value)
    weights.write_bytes(original)
    assert prompt_diffusion.load(registered.uri, settings) is not None
    other = settings.model_copy(update={"cache_dir": settings.cache_dir.with_name("other")})
    listing = artifact / "digests.json"
    listing.write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"was altered: digests\.json"):
        prompt_diffusion.load(registered.uri, other)


def test_a_damaged_copy_is_made_good_and_a_stranger_in_it_goes(imported):
    registered, settings, _ = imported
    folder = fetch(registered.uri, settings)
    before = snapshot(folder)
    target = folder / WEIGHTS
    damaged = bytes([target.read_bytes()[0] ^ 1]) + target.read_bytes()[1:]
    target.unlink()
    target.write_bytes(damaged)
    (folder / "model_index.json").unlink()
    # transformers and diffusers would read an index before the file that is registered
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert fetch(registered.uri, settings) == folder
    assert snapshot(folder) == before


@pytest.mark.parametrize("path", ["../outside.json", "unet/diffusion_pytorch_model.bin", "unet/run.py", "/etc/x.json"])
def test_a_list_that_names_what_no_model_holds_is_refused(tmp_path, path):
    listing, digest = digest_listing({path: "0" * 64})

    def fetch_file(name, target):
        assert name == "digests.json"
        target.write_bytes(listing)

    with pytest.raises(ValueError, match="which no model of this project has"):
        complete_copy(tmp_path / "models", digest, fetch_file, "models:/x/1")
    assert not (tmp_path / "outside.json").exists()


_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from prompt_diffusion.registry.cache import complete_copy
source, models, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def fetch(path, target):
    content = (source / path).read_bytes()
    if path.endswith("unet/diffusion_pytorch_model.safetensors"):
        target.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    target.write_bytes(content)

complete_copy(models, digest, fetch, "models:/x/1")
"""


def test_a_process_that_is_killed_while_it_fetches_leaves_nothing_that_counts(imported, tmp_path):
    registered, settings, artifact = imported
    digest = compute_digest((artifact / "digests.json").read_bytes())
    models = tmp_path / "killed" / "models"
    command = [sys.executable, "-c", _KILLED, str(artifact), str(models), digest]
    killed = subprocess.run(command, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (models / digest / "unet" / "diffusion_pytorch_model.safetensors").exists()
    finished = {path: (models / digest / path).stat().st_ino for path in snapshot(models / digest)}
    own = settings.model_copy(update={"cache_dir": models.parent})
    folder = fetch(registered.uri, own)
    assert snapshot(folder) == snapshot(fetch(registered.uri, settings))
    kept = [
        path for path, inode in finished.items() if (folder / path).exists() and (folder / path).stat().st_ino == inode
    ]
    assert kept  # what was finished was not fetched again


def test_loads_at_once_fetch_each_file_once(imported, tmp_path):
    registered, _, artifact = imported
    digest = compute_digest((artifact / "digests.json").read_bytes())
    fetched, lock = [], threading.Lock()

    def fetch_file(path, target):
        with lock:
            fetched.append(path)
        shutil.copyfile(artifact / path, target)

    with ThreadPoolExecutor(4) as pool:
        folders = set(
            pool.map(lambda _: complete_copy(tmp_path / "once", digest, fetch_file, registered.uri), range(4))
        )
    assert len(folders) == 1
    assert sorted(fetched) == sorted({*snapshot(folders.pop()), "digests.json"})


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("@nobody", r"the aliases challenger \(version 1\)"),
        ("@champion", r"the aliases challenger \(version 1\)"),
        ("@", r"the aliases challenger \(version 1\)"),
        ("/99", "the versions 1"),
        ("/one", "the versions 1"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_is_there(imported, rest, says):
    registered, settings, _ = imported
    reference = f"models:/{registered.name}{rest}"
    with pytest.raises(ValueError, match=rf"there is no registered model '{reference}'.* has {says}") as caught:
        prompt_diffusion.load(reference, settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no registered model"):
        set_alias(reference, "champion", settings)


def test_a_name_that_is_not_registered_says_which_are(imported):
    registered, settings, _ = imported
    with pytest.raises(ValueError, match=rf"'models:/other@challenger': registered are .*{registered.name}"):
        prompt_diffusion.load("models:/other@challenger", settings)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:1", "does not answer"),
        ("postgresql://user@127.0.0.1:1/mlflow", "does not answer"),
        ("sqlite:///{folder}/none.db", "there is no registry yet"),
        ("sqlite:///{folder}/text.db", "cannot be read"),
    ],
)
def test_a_registry_that_does_not_answer_is_one_sentence(settings, tmp_path, uri, says):
    (tmp_path / "text.db").write_text("this is no database, and long enough to be taken for none " * 20)
    away = settings.model_copy(update={"tracking_uri": uri.format(folder=tmp_path)})
    for call in (lambda: prompt_diffusion.load("models:/x@challenger", away), lambda: list_versions(away)):
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "none.db").exists()


def test_a_hubs_repository_is_loaded_from_the_stores_mirror(settings, pipeline_folder, tmp_path):
    own = settings.model_copy(update={"store": str(tmp_path / "store")})
    mirror_base("someone/prompt-diffusion", own.store, pipeline_folder)
    pipeline = prompt_diffusion.load("someone/prompt-diffusion", own)
    expected = prompt_diffusion.load(str(pipeline_folder), own)
    for ours, theirs in zip(pipeline.controlnet.parameters(), expected.controlnet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reference", ["/no/such/folder", "folder", "models/x/y/z", "", "http://somewhere/model"])
def test_a_reference_that_is_of_no_kind_says_which_there_are(settings, reference):
    with pytest.raises(ValueError, match="neither a folder nor a registered model"):
        prompt_diffusion.load(reference, settings)
