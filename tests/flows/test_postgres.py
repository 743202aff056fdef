"""The dry fan-out of ``benchmarks/fan_out.py`` on a real Postgres: every part runs, nothing fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]


def test_a_fan_out_on_postgres_makes_every_shard_without_an_error() -> None:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")):
        pytest.skip("no Postgres: Debian's package postgresql is not installed")
    command = [sys.executable, "benchmarks/fan_out.py", "--shards", "40", "--database", "postgres"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert [run["parts"] for run in runs] == [2, 40]
    for run in runs:
        assert run["database"] == "postgres"
        assert run["flow_state"] == "Completed"
        assert run["server_errors"] == 0
