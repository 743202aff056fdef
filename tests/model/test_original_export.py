"""Export is the inverse of import, and diffusers' port of the same weights becomes the same model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from original_checkpoint import HEADS, build_networks, draw_weights, save_tokenizer, schedule_buffers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prompt_diffusion
from prompt_diffusion.cli import app
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.original.bundle import import_bundle
from prompt_diffusion.model.original.convert import import_checkpoint, open_original
from prompt_diffusion.model.original.export import export_checkpoint
from prompt_diffusion.model.original.parts import ImportReport
from prompt_diffusion.model.original.provenance import describe_origin
from prompt_diffusion.model.original.read import read_checkpoint
from prompt_diffusion.model.references import DEMO_BASE_FOLDER
from prompt_diffusion.registry import ModelFacts, list_versions
from prompt_diffusion.settings import Settings

NETWORKS = ("unet", "vae", "text_encoder", "controlnet")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny stand-in for the released file, its tokenizer, and the pipeline that was imported from it."""
    folder = tmp_path_factory.mktemp("released")
    weights = draw_weights(build_networks())
    tokenizer = save_tokenizer(folder / "tokenizer")
    torch.save({"state_dict": weights | schedule_buffers()}, folder / "network.ckpt")
    import_checkpoint(open_original(folder / "network.ckpt", **HEADS), folder / "model", tokenizer, image_size=32)
    return folder, weights, tokenizer


def read_part(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=name)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_exporting_an_import_gives_every_weight_back_and_the_buffers_too(released, tmp_path, ending):
    folder, weights, _ = released
    report = export_checkpoint(folder / "model", tmp_path / f"again{ending}")
    assert (report.kind, report.weights) == ("prompt_diffusion", len(weights))
    again = read_checkpoint(tmp_path / f"again{ending}").tensors
    assert_same({name: again[name] for name in weights}, weights)
    for name, value in schedule_buffers().items():
        torch.testing.assert_close(again[name], value.to(again[name].dtype), rtol=1e-6, atol=1e-9)
    assert set(again) - set(weights) == set(report.buffers)


def test_importing_an_export_gives_the_same_model_to_the_last_bit(released, tmp_path):
    folder, _, tokenizer = released
    export_checkpoint(folder / "model", tmp_path / "file.safetensors")
    import_checkpoint(
        open_original(tmp_path / "file.safetensors", **HEADS), tmp_path / "again", tokenizer, image_size=32
    )
    for part in NETWORKS:
        assert_same(read_part(folder / "model", part), read_part(tmp_path / "again", part))
        first, second = (
            (place / part / "config.json").read_bytes() for place in (folder / "model", tmp_path / "again")
        )
        assert first == second
    for path in ("scheduler/scheduler_config.json", "model_index.json", "tokenizer/tokenizer.json"):
        assert (folder / "model" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_a_base_is_exported_and_comes_back(released, tmp_path):
    folder, _, tokenizer = released
    shutil.copytree(
        folder / "model", tmp_path / "base", ignore=shutil.ignore_patterns("controlnet", "model_index.json")
    )
    assert export_checkpoint(tmp_path / "base", tmp_path / "base.ckpt").kind == "base"
    import_checkpoint(open_original(tmp_path / "base.ckpt", **HEADS), tmp_path / "again", tokenizer)
    assert_same(read_part(tmp_path / "base", "unet"), read_part(tmp_path / "again", "unet"))


def make_port(model, folder, as_pickles=False):
    """The same model as diffusers' port keeps it: other names for the stems, text_model before the text encoder's."""
    shutil.copytree(model, folder)
    renames = {
        "controlnet": {
            "trunk.": "",
            "example_stem.": "controlnet_cond_embedding.",
            "query_stem.": "controlnet_query_cond_embedding.",
        },
        "text_encoder": {"": "text_model."},
    }
    for part in NETWORKS:
        file = next((folder / part).glob("*.safetensors"))
        tensors = {}
        for name, value in load_file(file).items():
            old, new = next(((o, n) for o, n in renames.get(part, {}).items() if name.startswith(o)), ("", ""))
            tensors[new + name.removeprefix(old)] = value
        file.unlink()
        if as_pickles:
            stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
            torch.save(tensors, folder / part / f"{stem}.bin")
        else:
            save_file(tensors, file)
    ours = json.loads((folder / "controlnet" / "config.json").read_text())
    config = ours["trunk_config"] | {
        "_class_name": "PromptDiffusionControlNetModel",
        "conditioning_channels": 6,
        "conditioning_embedding_out_channels": ours["stem_channels"],
    }
    (folder / "controlnet" / "config.json").write_text(json.dumps(config))
    (folder / "safety_checker").mkdir()
    return folder


@pytest.mark.parametrize("as_pickles", [False, True])
def test_a_folder_of_the_port_becomes_the_model_of_the_file_it_came_from(released, tmp_path, as_pickles):
    folder, _, _ = released
    port = make_port(folder / "model", tmp_path / "port", as_pickles)
    report = import_bundle(port, tmp_path / "out")
    assert (report.image_size, report.left_out) == (32, ("safety_checker",))
    for part in NETWORKS:
        assert_same(read_part(folder / "model", part), read_part(tmp_path / "out", part))
    controlnets = [
        PromptDiffusionControlNet.from_pretrained(place / "controlnet")
        for place in (folder / "model", tmp_path / "out")
    ]
    # the port feeds images in [0, 1], but its weights are those of [-1, 1]
    assert [controlnet.config["unit_query"] for controlnet in controlnets] == [False, False]
    assert load_base(str(tmp_path / "out")).scheduler.config == load_base(str(folder / "model")).scheduler.config


def test_a_folder_of_something_else_is_refused(released, tmp_path):
    folder, _, _ = released
    with pytest.raises(ValueError, match="in this project's own layout already"):
        import_bundle(folder / "model", tmp_path / "out")
    port = make_port(folder / "model", tmp_path / "port")
    file = port / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    query = "controlnet_query_cond_embedding"
    gone = tensors.pop(f"{query}.conv_in.weight")
    save_file(tensors | {f"{query}.extra": gone}, file)
    with pytest.raises(ValueError, match=rf"lacks {query}\.conv_in\.weight; and has .*: {query}\.extra"):
        import_bundle(port, tmp_path / "out")
    config = json.loads((port / "controlnet" / "config.json").read_text())
    (port / "controlnet" / "config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModel"}))
    with pytest.raises(ValueError, match="it has no stem for an example pair"):
        import_bundle(port, tmp_path / "out")
    shutil.rmtree(port / "controlnet")
    with pytest.raises(ValueError, match="it has no controlnet"):
        import_bundle(port, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_original_layout_cannot_express_is_said_in_one_sentence(released, tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot express the UNet's norm_num_groups 16 \(32\);.*'v_prediction' \('epsilon'\)"
    ):
        export_checkpoint(DEMO_BASE_FOLDER, tmp_path / "demo.safetensors")
    folder, _, _ = released
    shutil.copytree(folder / "model", tmp_path / "model")
    config = tmp_path / "model" / "controlnet" / "config.json"
    content = json.loads(config.read_text())
    for change, sentence in (
        ({"example_pair": False}, "without an example stem"),
        ({"unit_query": True}, r"in \[0, 1\]"),
    ):
        config.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=sentence):
            export_checkpoint(tmp_path / "model", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.ckpt"):
        export_checkpoint(folder / "model", tmp_path / "x.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_import_register_load_generate_export_is_one_round(released, tmp_path, monkeypatch, make_mlflow_database):
    folder, weights, _ = released
    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_mlflow_database(tmp_path))
    monkeypatch.chdir(tmp_path)
    heads = ("--heads", 4, "--text-heads", 2, "--tokenizer", folder / "tokenizer")
    result = run(
        "import-checkpoint", folder / "network.ckpt", "--register", "released", *heads, "--image-size", 32, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["registered"] == "models:/released/1"
    assert json.loads(result.stdout)["folder"] is None
    [version] = list_versions(Settings(), "released")
    assert version.source.startswith("network.ckpt, sha256 ")
    assert version.licences["base"] == "unknown"  # a tiny stand-in is not the released file
    pipeline = prompt_diffusion.load("models:/released@challenger")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    made = pipeline("a red cube", (images[0], images[1]), images[2], num_inference_steps=2, output_type="uint8")
    assert made.images.shape == (1, 32, 32, 3)
    assert np.ptp(made.images) > 0
    result = run("export-checkpoint", "models:/released@challenger", "--out", tmp_path / "again.ckpt", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["architecture"]["unet"]["num_heads"] == 4
    again = read_checkpoint(tmp_path / "again.ckpt").tensors
    assert_same({name: again[name] for name in weights}, weights)
    assert not any(path.name.startswith("network") for path in tmp_path.iterdir())


def test_the_released_file_is_known_by_name_and_sizes_and_carries_its_licences():
    sizes = {
        "unet": {"tensors": 686, "parameters": 859_520_964},
        "controlnet": {"tensors": 356, "parameters": 362_366_032},
    }
    report = ImportReport("prompt_diffusion", "network-step=04999.ckpt", "0" * 64, 256, sizes, {})
    facts = ModelFacts(**describe_origin(report))
    assert facts.licences["base"] == "CreativeML OpenRAIL-M"
    assert len(facts.vision_tasks) == 6
    for change in ({"source": "other.ckpt"}, {"parts": {}}):
        assert ModelFacts(**describe_origin(replace(report, **change))).licences["base"] == "unknown"


def test_a_base_is_not_registered(released, tmp_path):
    folder, weights, _ = released
    save_file({k: v for k, v in weights.items() if not k.startswith("control_model.")}, tmp_path / "base.safetensors")
    result = run(
        "import-checkpoint", tmp_path / "base.safetensors", "--register", "x", "--heads", 4, "--text-heads", 2,
        "--tokenizer", folder / "tokenizer",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "is a base: it is not registered" in result.stderr
