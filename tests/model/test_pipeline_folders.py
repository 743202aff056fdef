"""A pipeline on disk: what loads it, what a damaged one is refused for, and a hub that it is pushed to."""

import base64
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import hf_api
from safetensors.torch import load_file, save_file

from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def generate(draw_images, seeded):
    source, target, query = draw_images(1)
    return lambda pipeline: (
        pipeline("a red cube", (source, target), query, generator=seeded(1), output_type="uint8").images
    )


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_a_saved_pipeline_loads_from_safetensors_and_json_alone(pipeline, saved, generate):
    kinds = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".txt"}
    found = load_pipeline(saved)
    np.testing.assert_array_equal(generate(found), generate(pipeline))
    assert not any(p.requires_grad for part in (found.unet, found.controlnet, found.vae) for p in part.parameters())


def test_diffusers_own_from_pretrained_loads_it_with_our_controlnet(pipeline, saved, generate):
    found = PromptDiffusionPipeline.from_pretrained(saved)
    found.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(generate(found), generate(pipeline))
    other = diffusers.UniPCMultistepScheduler.from_config(found.scheduler.config)
    assert PromptDiffusionPipeline.from_pretrained(saved, scheduler=other).scheduler is other


def test_the_models_own_steps_and_guidance_are_saved_and_older_folders_have_diffusers(folder):
    for load in (load_pipeline, PromptDiffusionPipeline.from_pretrained):
        found = load(folder)
        assert (found.default_num_inference_steps, found.default_guidance_scale, found.image_size) == (3, 2.0, 32)
    edit_json(folder / "model_index.json", default_num_inference_steps=None, default_guidance_scale=None)
    for load in (load_pipeline, PromptDiffusionPipeline.from_pretrained):
        found = load(folder)
        assert (found.default_num_inference_steps, found.default_guidance_scale) == (50, 7.5)


def test_a_model_works_at_the_size_that_it_was_trained_at_not_at_its_bases(folder):
    edit_json(folder / "model_index.json", default_image_size=16)
    for load in (load_pipeline, PromptDiffusionPipeline.from_pretrained):
        assert load(folder).image_size == 16


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_the_scheduler_that_was_saved_is_the_one_that_is_loaded(pipeline, folder, generate, name):
    own = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(own.config)
    try:
        pipeline.save_pretrained(folder)
        found = load_pipeline(folder)
        assert type(found.scheduler).__name__ == name
        np.testing.assert_array_equal(generate(found), generate(pipeline))
    finally:
        pipeline.scheduler = own


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler"])
def test_a_part_that_is_missing_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"is no Prompt Diffusion pipeline: it has no {part}; copy the whole folder"):
        load_pipeline(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "controlnet", "vae", "text_encoder"])
def test_a_weight_that_is_not_finite_is_named(folder, part, value):
    path = next((folder / part).glob("*.safetensors"))
    weights = load_file(path)
    name = sorted(weights)[3]
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"copy/{part} has NaN or infinite values in .*{name}: the file is damaged"):
        load_pipeline(folder)


def test_weights_that_are_missing_or_cut_short_are_named(folder):
    path = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["query_stem.conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"copy/controlnet lacks weights: there is no query_stem.conv_in.weight"):
        load_pipeline(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="has no controlnet that can be loaded") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_a_part_of_another_class_is_named(folder):
    edit_json(folder / "controlnet" / "config.json", _class_name="ControlNetModel")
    with pytest.raises(
        ValueError,
        match="controlnet holds a ControlNetModel, but the controlnet of a pipeline is a PromptDiffusionControlNet",
    ):
        load_pipeline(folder)
    edit_json(folder / "text_encoder" / "config.json", architectures=["T5EncoderModel"])
    with pytest.raises(ValueError, match=r"text_encoder holds a T5EncoderModel, but .* is a CLIPTextModel"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", ["AutoencoderKL", "os", "NoSuchScheduler", "ConfigMixin", None])
def test_a_scheduler_that_is_none_of_diffusers_is_refused(folder, name):
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(ValueError, match=f"scheduler names {name!r}, which is no scheduler of diffusers"):
        load_pipeline(folder)


def test_code_beside_the_weights_is_not_run(folder, tmp_path, generate, pipeline):
    """Neither a file that a configuration points to, nor one that has the name of a part."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass DDIMScheduler: pass\n"
    for part in ("scheduler", "unet", "controlnet", "tokenizer", "text_encoder"):
        (folder / part / "code.py").write_text(code)
        for config in (folder / part).glob("*config.json"):
            edit_json(config, auto_map={"AutoModel": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]})
    (folder / "pipeline.py").write_text(code)
    edit_json(folder / "model_index.json", scheduler=["code", "DDIMScheduler"])
    np.testing.assert_array_equal(generate(load_pipeline(folder)), generate(pipeline))
    assert not (tmp_path / "ran").exists()


class _Hub(BaseHTTPRequestHandler):
    """So much of a hub's interface as a push takes: make a repository, say how to send files, take a commit."""

    files: dict[str, bytes]
    calls: list[str]

    def do_GET(self):
        self._answer({}, 404)

    def do_HEAD(self):
        self._answer({}, 404)

    def do_POST(self):
        self.calls.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self._answer({"url": f"{self.address()}/someone/{json.loads(body)['name']}"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer({"files": modes})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.address()}/someone/pushed/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._answer({"name": "someone", "type": "user"})

    def address(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[_Hub]]:
    """A hub on this machine that the client is pointed at."""
    handler = type("Hub", (_Hub,), {"files": {}, "calls": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        yield handler
        server.shutdown()
        thread.join()


def test_a_pipeline_that_is_pushed_to_a_hub_is_all_there(pipeline, hub, tmp_path, generate):
    pipeline.push_to_hub("someone/pushed", token="hf_of_a_test")
    assert "/api/repos/create" in hub.calls
    for name, content in hub.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert "README.md" in hub.files
    np.testing.assert_array_equal(generate(load_pipeline(tmp_path)), generate(pipeline))
    weights = load_file(tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["query_stem.conv_in.weight"], pipeline.controlnet.query_stem.conv_in.weight)


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", '{"model": {}}', "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_none_is_one_sentence(folder, name, content):
    (folder / "tokenizer" / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"has no tokenizer that can be loaded|the tokenizer makes up to") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_189_megabytes_is_not_read(folder):
    with (folder / "tokenizer" / "tokenizer.json").open("ab") as file:
        file.truncate(189 << 20)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 189 MB, and up to 32 MB are read"):
        load_pipeline(folder)


def test_a_tokenizer_of_more_tokens_than_the_encoder_knows_is_refused(folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens([f"<token-{number}>" for number in range(500)])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, and the text encoder knows \d+"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    "name", ["SchedulerMixin", "FlaxDDIMScheduler", "AutoencoderKL", "__name__", "../x", ["a"], None, 3]
)
def test_a_scheduler_that_is_none_is_one_sentence(folder, name):
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(ValueError, match="which is no scheduler of diffusers") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": -1},
        {"beta_schedule": "none of these"},
        {"beta_start": []},
        {"trained_betas": {}},
        {"prediction_type": 5, "beta_end": "x"},
    ],
)
def test_a_scheduler_of_impossible_settings_is_one_sentence(folder, changes):
    edit_json(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=r"scheduler") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)
