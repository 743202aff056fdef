"""A base is known by what it holds: not by its place, its precision on disk, or who wrote it."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from prompt_diffusion.cli import app
from prompt_diffusion.model import mirror
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.mirror import find_model, mirror_base
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.model.references import DEMO_BASE_FOLDER, PARTS, base_digest, controlnet_digest
from prompt_diffusion.store.storage import list_files, write_bytes
from prompt_diffusion.store.uris import join_uri
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.stage import Train

REPOSITORY = "someone/tiny-base"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mirror._open_mirror.cache_clear()


def save_pipeline(base, folder):
    torch.manual_seed(0)
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, (4, 8, 8))
    PromptDiffusionPipeline.from_parts(base, controlnet).save_pretrained(folder)
    return str(folder)


def test_a_pipeline_that_was_trained_from_a_base_shares_its_frozen_parts(tmp_path):
    base = load_base("demo-base")  # float16 on disk; a pipeline is saved in float32
    with torch.no_grad():
        base.unet.conv_out.bias += 1
    trained = save_pipeline(base, tmp_path / "trained")
    for parts in (("vae",), ("text_encoder", "tokenizer"), ("scheduler",)):
        assert base_digest(trained, parts) == base_digest("demo-base", parts)
    assert base_digest(trained, ("unet",)) != base_digest("demo-base", ("unet",))
    assert base_digest(trained) != base_digest("demo-base")
    assert base_digest("demo-base", ("vae",)) != base_digest("demo-base", ("unet",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_values_count_and_every_one_does(tiny_base, tmp_path, dtype):
    base = load_base(tiny_base)
    base.save(tmp_path / "low", dtype)
    low = load_base(str(tmp_path / "low"))
    low.save(tmp_path / "same-values")
    assert base_digest(str(tmp_path / "low")) == base_digest(str(tmp_path / "same-values")) != base_digest(tiny_base)
    with torch.no_grad():
        low.vae.decoder.conv_out.bias[0] += 1e-3
    low.save(tmp_path / "other")
    assert base_digest(str(tmp_path / "other"), ("vae",)) != base_digest(str(tmp_path / "low"), ("vae",))


def test_shards_a_readme_and_a_pickle_do_not_count_and_a_configuration_does(tiny_base, tmp_path):
    base = load_base(tiny_base)
    base.save(tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("about")
    (tmp_path / "one" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    assert base_digest(str(tmp_path / "one")) == base_digest(tiny_base)
    shutil.copytree(tmp_path / "one", tmp_path / "sharded")
    (tmp_path / "sharded" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    base.unet.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 1
    assert base_digest(str(tmp_path / "sharded")) == base_digest(tiny_base)
    file = tmp_path / "one" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.5}))
    base_digest.cache_clear()
    assert base_digest(str(tmp_path / "one")) != base_digest(tiny_base)


def test_what_is_missing_or_damaged_is_named(tiny_base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model.safetensors is damaged: .*cut short"):
        base_digest(str(copy))
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model.safetensors is damaged: no safetensors file"):
        base_digest(str(copy))
    shutil.rmtree(copy / "vae")
    with pytest.raises(ValueError, match="copy is no model in diffusers' layout: it has no vae"):
        base_digest(str(copy))
    with pytest.raises(ValueError, match="has no vae that can be loaded"):
        load_base(str(copy))


def test_a_base_that_is_nowhere_is_refused_in_one_sentence():
    for attempt in (lambda: base_digest("no/where"), lambda: load_base("no/where")):
        with pytest.raises(ValueError, match="model 'no/where' cannot be had: it is no folder here") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_the_controlnet_beside_a_base_is_known_by_its_weights(tiny_base, tmp_path):
    first = save_pipeline(load_base(tiny_base), tmp_path / "first")
    again = save_pipeline(load_base(tiny_base), tmp_path / "again")
    assert controlnet_digest("base", first) == controlnet_digest("base", again)
    assert controlnet_digest(f"{first}/controlnet", "demo-base") == controlnet_digest("base", first)
    with pytest.raises(ValueError, match="base 'demo-base' has no controlnet beside it"):
        controlnet_digest("base", "demo-base")


def test_a_mirrored_base_is_found_under_its_name_without_a_hub(store_root, tiny_base, tmp_path):
    cache = tmp_path / "cache"
    assert find_model(REPOSITORY, store_root, cache) == REPOSITORY
    digests = mirror_base(REPOSITORY, store_root, DEMO_BASE_FOLDER)
    assert {path.split("/")[0] for path in digests} == set(PARTS)
    mirror._open_mirror.cache_clear()
    found = find_model(REPOSITORY, store_root, cache)
    assert base_digest(found) == base_digest("demo-base")
    assert load_base(found).tokenizer.model_max_length == load_base("demo-base").tokenizer.model_max_length
    # another revision is another entry
    assert find_model(f"{REPOSITORY}@v2", store_root, cache) == f"{REPOSITORY}@v2"


def test_a_mirror_without_its_digests_does_not_count_and_an_altered_one_is_refused(tmp_store, tiny_base, tmp_path):
    mirror_base(REPOSITORY, tmp_store, DEMO_BASE_FOLDER)
    folder = join_uri(tmp_store, "mirror/bases", REPOSITORY)
    write_bytes(f"{folder}/unet/config.json", b"{}")
    with pytest.raises(ValueError, match=r"unet/config\.json is not what was mirrored: its sha256 is"):
        find_model(REPOSITORY, tmp_store, tmp_path)
    (tmp_path / "store/mirror/bases" / REPOSITORY / "digests.json").unlink()
    assert find_model(REPOSITORY, tmp_store, tmp_path) == REPOSITORY


def test_nothing_is_mirrored_from_a_folder_that_holds_no_model(tmp_store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no model in diffusers' layout"):
        mirror_base(REPOSITORY, tmp_store, tmp_path / "empty")
    assert list_files(tmp_store) == []


def test_ours_and_local_names_are_never_looked_up_in_a_mirror(tmp_store, tiny_base, tmp_path):
    assert find_model("demo-base", tmp_store, tmp_path) == "demo-base"
    assert find_model("base", tmp_store, tmp_path) == "base"
    assert find_model(tiny_base, tmp_store, tmp_path) == tiny_base


def test_neither_path_enters_a_training_and_both_contents_do(tiny_base, tmp_path, train_refs):
    first = save_pipeline(load_base(tiny_base), tmp_path / "first")
    again = save_pipeline(load_base(tiny_base), tmp_path / "again")

    def fingerprint(**fields):
        config = TrainConfig(vision_tasks=("image_to_hed",), **fields)
        return Train(config, train_refs(("hed",))).identity.fingerprint

    assert fingerprint(base=first, controlnet="base") == fingerprint(base=again, controlnet=f"{first}/controlnet")
    expected = {fingerprint(base=first), fingerprint(base=first, controlnet="base"), fingerprint(base="demo-base")}
    assert len(expected) == 3


def test_the_command_fills_the_mirror_from_a_folder_and_says_what_is_wrong(tmp_store, tmp_path):
    arguments = ["weights", "mirror-base", REPOSITORY, "--store", tmp_store, "--from"]
    done = CliRunner().invoke(app, [*arguments, str(DEMO_BASE_FOLDER)])
    assert done.exit_code == 0
    assert "unet/diffusion_pytorch_model.safetensors  sha256 " in done.stdout
    assert base_digest(find_model(REPOSITORY, tmp_store, tmp_path)) == base_digest("demo-base")
    failed = CliRunner().invoke(app, [*arguments, str(tmp_path / "nowhere")])
    assert failed.exit_code == 2
    assert failed.stderr.endswith("nowhere holds no model in diffusers' layout with safetensors: nothing is mirrored\n")
