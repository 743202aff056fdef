import json

import pytest
from typer.testing import CliRunner

from prompt_diffusion.cli import app


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("demo", "--preset", "nightly"), "unknown preset 'nightly'"),
        (("demo", "--set", "train.lr=1"), "unknown field 'train.lr'"),
        (("demo", "--set", "train.num_steps"), "--set takes KEY=VALUE"),
        (("demo", "--store", "/proc/nowhere"), "/proc/nowhere"),
        (("manifest", "/no/such/folder"), "is not sealed"),
        (("table", "--store", "/no/such/folder"), "no"),
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
