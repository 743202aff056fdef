"""Import of files in the original layout: every tensor accounted for, nothing executed, nothing half-written."""

import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from original_checkpoint import HEADS, build_networks, draw_weights, save_tokenizer, schedule_buffers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prompt_diffusion.cli import app
from prompt_diffusion.model import mirror
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.model.original.convert import account_for, import_checkpoint, open_original
from prompt_diffusion.model.original.infer import infer_layout
from prompt_diffusion.model.original.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def weights():
    return draw_weights(build_networks())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def bring_in(path, out, tokenizer, **options):
    return import_checkpoint(open_original(path, **HEADS), out, tokenizer, **options)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def only_base(weights):
    return {name: value for name, value in weights.items() if not name.startswith("control_model.")}


def test_a_lightning_checkpoint_becomes_a_pipeline_with_every_bit_and_says_what_it_left_out(
    weights, tokenizer, tmp_path
):
    content = {"state_dict": weights | schedule_buffers(), "epoch": 3, "global_step": 4999, "callbacks": {}}
    torch.save(content, tmp_path / "network-step=04999.ckpt")
    phases = []
    report = bring_in(tmp_path / "network-step=04999.ckpt", tmp_path / "out", tokenizer, on_phase=phases.append)
    assert phases == ["checking every weight", "computing the digest", "writing the model"]
    assert (report.kind, report.image_size) == ("prompt_diffusion", 256)
    assert sum(part["tensors"] for part in report.parts.values()) == len(weights)
    assert set(report.buffers) == set(schedule_buffers())
    assert [text.split()[0] for text in report.left_out] == ["epoch", "global_step", "callbacks"]
    pipeline = load_pipeline(tmp_path / "out")
    assert (pipeline.default_num_inference_steps, pipeline.default_guidance_scale, pipeline.image_size) == (
        100,
        9.0,
        256,
    )
    assert pipeline.scheduler.config.beta_end == 0.012
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    pairs = [
        (pipeline.controlnet.example_stem.conv_in.weight, "control_model.input_hint_block.0.weight"),
        (pipeline.controlnet.query_stem.conv_out.bias, "control_model.input_cond_block.14.bias"),
        (pipeline.unet.conv_out.weight, "model.diffusion_model.out.2.weight"),
    ]
    for ours, name in pairs:
        torch.testing.assert_close(ours, weights[name], rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network-step=04999.ckpt", "out"]


def test_every_single_missing_tensor_is_named(weights):
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    for name in weights:
        rest = {other: value for other, value in weights.items() if other != name}
        with pytest.raises(ValueError, match=r"lacks|reads") as error:
            account_for(rest, infer_layout({other: shapes[other] for other in rest}, 4, 2), "it")
        assert name in str(error.value)


def test_a_tensor_without_a_place_is_named_and_so_is_one_of_another_shape(weights, tokenizer, tmp_path):
    save_file(weights | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors has .* no place for: .*label_emb\.0\.0\.weight"):
        open_original(tmp_path / "a.safetensors", **HEADS)
    name = "model.diffusion_model.middle_block.0.out_layers.3.weight"
    save_file(weights | {name: torch.ones(64, 32, 3, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"layers\.3\.weight \[64, 32, 3, 3\] in place of \[64, 64, 3, 3\]"):
        bring_in(tmp_path / "b.safetensors", tmp_path / "out", tokenizer)


def test_the_shapes_decide_which_stem_is_which(weights, tmp_path):
    stems = {"control_model.input_hint_block": "control_model.input_cond_block"}
    stems |= {new: old for old, new in stems.items()}
    swapped = {name.replace(p := ".".join(name.split(".")[:2]), stems.get(p, p)): v for name, v in weights.items()}
    save_file(swapped, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"input_hint_block\.0\.weight reads 3 channels, but .* pair reads 6"):
        open_original(tmp_path / "a.safetensors", **HEADS)


def test_a_base_without_a_control_model_is_what_trainings_start_from(weights, tokenizer, tmp_path):
    torch.save(only_base(weights), tmp_path / "v1-5.ckpt")
    report = bring_in(tmp_path / "v1-5.ckpt", tmp_path / "base", tokenizer, image_size=32)
    assert report.kind == "base"
    base = load_base(str(tmp_path / "base"))
    assert base.unet.config.sample_size == 4
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    torch.testing.assert_close(
        base.vae.encoder.mid_block.attentions[0].to_q.weight, weights[name][:, :, 0, 0], rtol=0, atol=0
    )
    assert base.encode_text(["a red cube"]).shape == (1, 24, 32)


def test_half_precision_stays_half(weights, tokenizer, tmp_path):
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / "a.safetensors")
    bring_in(tmp_path / "a.safetensors", tmp_path / "out", tokenizer)
    for part in ("unet", "vae", "controlnet"):
        kept = load_file(tmp_path / "out" / part / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in kept.values()} == {torch.float16}


def test_moving_averages_are_accounted_for_and_taken_when_asked(weights, tokenizer, tmp_path):
    averages = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
        for name, value in weights.items()
        if name.startswith("model.diffusion_model.")
    }
    notes = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    save_file(only_base(weights) | averages | notes, tmp_path / "a.safetensors")
    plain = bring_in(tmp_path / "a.safetensors", tmp_path / "plain", tokenizer)
    assert "model_ema" in plain.left_out[0]
    bring_in(tmp_path / "a.safetensors", tmp_path / "averaged", tokenizer, take_averages=True)
    first, second = (load_base(str(tmp_path / name)).unet.conv_in.bias for name in ("plain", "averaged"))
    torch.testing.assert_close(first + 1, second)
    averages.popitem()
    save_file(only_base(weights) | averages | notes, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"lacks model_ema\.diffusion_modelout2bias"):
        open_original(tmp_path / "b.safetensors", **HEADS)


def test_a_schedule_is_taken_from_the_file_and_an_unknown_one_refused(weights, tokenizer, tmp_path):
    buffers = {"betas": torch.linspace(0.0001, 0.02, 500), "scale_factor": torch.tensor(0.5)}
    save_file(weights | buffers, tmp_path / "a.safetensors")
    bring_in(tmp_path / "a.safetensors", tmp_path / "out", tokenizer)
    pipeline = load_pipeline(tmp_path / "out")
    config = pipeline.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps) == (
        "linear", 0.0001, 0.02, 500,
    )  # fmt: skip
    assert pipeline.vae.config.scaling_factor == 0.5
    save_file(weights | {"betas": torch.rand(1000)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="betas follow no known noise schedule"):
        bring_in(tmp_path / "b.safetensors", tmp_path / "other", tokenizer)


def write_broken(weights, folder):
    """Files that are no good, each with a part of the sentence that says so."""
    whole = folder / "whole.ckpt"
    torch.save({"state_dict": weights}, whole)
    save_file(weights, folder / "whole.safetensors")
    (folder / "cut.ckpt").write_bytes(whole.read_bytes()[:-5000])
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-5000])
    (folder / "text.ckpt").write_text("<html>please log in</html>")
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": weights, "model": Harm()}, folder / "object.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Harm(), protocol=2))
    (folder / "newer.ckpt").write_bytes(b"\x80\x04K\x01.")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"model.diffusion_model.x": 3}, folder / "numbers.ckpt")
    save_file({"conditioner.x": torch.ones(2)}, folder / "xl.safetensors")
    name = "control_model.zero_convs.0.0.weight"
    save_file(weights | {name: torch.full((32, 32, 1, 1), torch.nan)}, folder / "nan.safetensors")
    save_file(weights | {name: torch.full((32, 32, 1, 1), torch.inf)}, folder / "inf.safetensors")
    save_file(weights | {name: torch.ones(32, 32, 1, 1, dtype=torch.int8)}, folder / "int8.safetensors")
    return {
        "missing.ckpt": "there is no file or folder",
        "cut.ckpt": "is cut short",
        "cut.safetensors": "no whole safetensors file",
        "text.ckpt": "neither safetensors nor a file that torch.save wrote",
        "empty.ckpt": "neither safetensors nor a file that torch.save wrote",
        "object.ckpt": "holds a pickled posix.mkdir",
        "pickle.ckpt": "holds a pickled posix.mkdir",
        "newer.ckpt": "is damaged",
        "list.ckpt": "it holds a list, not tensors by name",
        "numbers.ckpt": "it also holds model.diffusion_model.x (int)",
        "xl.safetensors": "it lacks a UNet (model.diffusion_model.*)",
        "nan.safetensors": "NaN or infinite: control_model.zero_convs.0.0.weight",
        "inf.safetensors": "NaN or infinite: control_model.zero_convs.0.0.weight",
        "int8.safetensors": "control_model.zero_convs.0.0.weight (torch.int8)",
    }


class Harm:
    """Pickles as a call that leaves a trace where it is executed."""

    def __reduce__(self):
        return os.mkdir, (f"{os.environ['PROMPT_DIFFUSION_CACHE_DIR']}/executed",)


def test_broken_files_are_one_sentence_nothing_is_executed_and_nothing_written(weights, tokenizer, tmp_path, cache_dir):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sentences = write_broken(weights, tmp_path)
    before = sorted(tmp_path.iterdir())
    for name, sentence in sentences.items():
        result = run(
            "import-checkpoint", tmp_path / name, "--out", tmp_path / "out", "--heads", 4, "--text-heads", 2,
            "--tokenizer", tmp_path / "tokenizer",
        )  # fmt: skip
        assert result.exit_code == 2, name
        assert sentence in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert not (cache_dir / "executed").exists()


def test_what_lightning_writes_beside_the_weights_is_no_obstacle(weights, tmp_path, monkeypatch):
    """SD v1.x's own files name Lightning's class, with values that are numpy's."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
    callbacks = {module.ModelCheckpoint: {"best_model_score": np.float64(0.1), "current": module.ModelCheckpoint()}}
    torch.save({"state_dict": weights, "callbacks": callbacks}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules
    assert open_original(tmp_path / "a.ckpt", **HEADS).extras == ("callbacks",)


def test_a_place_that_is_taken_is_left_alone(weights, tokenizer, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is already there"):
        bring_in(tmp_path / "a.safetensors", tmp_path / "out", tokenizer)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_tokenizer_comes_from_the_mirror_of_the_base_or_is_asked_for(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mirror._open_mirror.cache_clear()
    with pytest.raises(
        ValueError, match=r"tokenizer 'openai/clip-vit-large-patch14' cannot be had.*--tokenizer FOLDER"
    ):
        load_tokenizer(None, str(tmp_path / "store"), tmp_path / "cache")
    mirror.mirror_base("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tmp_path / "store"), Path(tiny_base))
    mirror._open_mirror.cache_clear()
    found = load_tokenizer(None, str(tmp_path / "store"), tmp_path / "cache")
    assert found.get_vocab() == load_base(tiny_base).tokenizer.get_vocab()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no CLIP tokenizer"):
        load_tokenizer(str(tmp_path / "empty"), str(tmp_path / "store"), tmp_path / "cache")


def test_another_models_tokenizer_is_refused(weights, tokenizer, tmp_path):
    save_file(weights | {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(90, 32)},
              tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="but the text encoder knows 90: it is another model's tokenizer"):
        bring_in(tmp_path / "a.safetensors", tmp_path / "out", tokenizer)


def test_json_says_where_everything_went(weights, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_file(weights, tmp_path / "a.safetensors")
    result = run(
        "import-checkpoint", tmp_path / "a.safetensors", "--out", tmp_path / "out", "--heads", 4, "--text-heads", 2,
        "--tokenizer", tmp_path / "tokenizer", "--image-size", 64, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["folder"] == str(tmp_path / "out")
    assert content["registered"] is None
    assert content["architecture"]["unet"]["channel_mult"] == [1, 2]
    assert content["parts"]["unet"]["tensors"] == sum(name.startswith("model.diffusion_model.") for name in weights)


@pytest.mark.parametrize("command", ["import-checkpoint", "export-checkpoint"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: prompt-diffusion {command}" in result.stdout
