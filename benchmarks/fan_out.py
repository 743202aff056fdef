"""Claim: large parts keep the orchestration of a full-size annotation small; one task per shard does not.

A dry fan-out: as many shards as InstructPix2Pix has (313,010 pairs, 256 per shard), each of one tiny pair and annotated by
Canny, which takes no time, through the real flow against a real Prefect server, on SQLite and on Postgres (Debian's
package ``postgresql``). What it takes is orchestration and the store's own work. Measured in turn in one process: the
library alone, parts of 32 shards, and one task per shard. The last line is one JSON object.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _measuring import add_out_option, describe_device, find_versions, finish
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_LOGGING_LEVEL, temporary_settings

from flows.annotate import annotate_six_task
from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.data.ingest import Ingest
from prompt_diffusion.presets import build_preset
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.stage import Context, obtain

FULL_SET_SHARDS = 1223
FAT_PART_SHARDS = 32


def find_free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def serve_postgres() -> Iterator[str]:
    """Run Postgres on a folder of its own, and yield the address of its database for Prefect."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not programs:
        raise SystemExit("no Postgres here: install Debian's package `postgresql`, or pass --database sqlite")
    bin_folder, port = programs[-1].parent, find_free_port()
    # Postgres refuses to be root.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="fan-out-postgres-"))
    if as_user:
        shutil.chown(folder, "postgres", "postgres")

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    run(str(bin_folder / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "prefect")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c max_connections=200"
    run(str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        run(str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serve_prefect(database: str | None) -> Iterator[Path]:
    """Run a Prefect server on that database (None: its own SQLite), point this process at it, and yield its log."""
    home, port = Path(tempfile.mkdtemp(prefix="fan-out-prefect-")), find_free_port()
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    if database is not None:
        environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-ui",
    ]
    with (home / "server.log").open("wb") as sink:
        server = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
    url = f"http://127.0.0.1:{port}/api"
    try:
        _wait_until_healthy(server, url, home / "server.log")
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home, PREFECT_LOGGING_LEVEL: "WARNING"}):
            yield home / "server.log"
            APILogWorker.drain_all()
            EventsWorker.drain_all()
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit(f"Prefect's server did not start: {log.read_text()[-2000:]}")


def build_overrides(num_shards: int, shards_per_part: int) -> dict[str, Any]:
    """Return the dry run's fields: one tiny pair per shard, Canny alone, two parts at once."""
    return {
        "ingest.source.num_groups": num_shards,
        "ingest.shard_rows": 1,
        "ingest.image_size": 16,
        "annotate": [{"condition": "canny", "annotator": "canny"}],
        "resources.annotate_fan_out.devices": ["cpu:0", "cpu:1"],
        "resources.annotate_fan_out.shards_per_part": shards_per_part,
    }


def measure_library(num_shards: int, store: str) -> tuple[ManifestRef, float]:
    """Ingest the pairs, then annotate them without an orchestrator; return the pairs and the seconds of the latter."""
    config = build_preset("smoke", build_overrides(num_shards, 1))
    pairs = obtain(Ingest(config.ingest), Context(store, None))
    started = time.perf_counter()
    obtain(Annotate(config.annotate[0], pairs), Context(store, AnnotateResources()))
    return pairs, time.perf_counter() - started


def measure_flow(num_shards: int, shards_per_part: int, store: str, log: Path) -> dict[str, Any]:
    """Run the flow on the ingested pairs; return its seconds, its tasks and what failed."""
    overrides = build_overrides(num_shards, shards_per_part)
    started = time.perf_counter()
    rows = annotate_six_task("smoke", overrides, store)["canny"].rows
    seconds = time.perf_counter() - started
    assert rows == num_shards, f"{rows} of {num_shards} pairs have maps"
    lines = log.read_text()
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
    return {
        "shards_per_part": shards_per_part,
        "parts": -(-num_shards // shards_per_part),
        "seconds": round(seconds, 2),
        "database_locked": lines.count("database is locked"),
        "server_errors": lines.count("ERROR"),
        "flow_state": runs[0].state_name if runs else None,
    }


def measure_database(name: str, num_shards: int, root: Path) -> list[dict[str, Any]]:
    """Return what each size of part takes on one database, each in a store that holds the pairs alone."""
    results = []
    with serve_postgres() if name == "postgres" else _nothing() as database:
        for shards_per_part in (FAT_PART_SHARDS, 1):
            with serve_prefect(database) as log:
                store = root / f"{name}-{shards_per_part}"
                shutil.copytree(root / "pairs" / "ingest", store / "ingest")
                results.append({"database": name, **measure_flow(num_shards, shards_per_part, str(store), log)})
    return results


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=FULL_SET_SHARDS)
    parser.add_argument("--database", choices=["sqlite", "postgres", "both"], default="both")
    add_out_option(parser)
    arguments = parser.parse_args()
    names = ["sqlite", "postgres"] if arguments.database == "both" else [arguments.database]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _, library_seconds = measure_library(arguments.shards, str(root / "pairs"))
        runs = [run for name in names for run in measure_database(name, arguments.shards, root)]
    fat, thin = (run["seconds"] for run in runs[-2:])
    tasks = arguments.shards - -(-arguments.shards // FAT_PART_SHARDS)
    result = {
        "name": "fan_out",
        "ratio": round(thin / fat, 2),
        "ours": fat,
        "peer": thin,
        "unit": f"seconds for {arguments.shards} shards on {names[-1]}: parts of {FAT_PART_SHARDS} against one task a shard",
        "spread": [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)],
        "device": describe_device(),
        "versions": find_versions("prefect"),
        "library_seconds": round(library_seconds, 2),
        "seconds_a_task": round((thin - fat) / max(tasks, 1), 4),
        "runs": runs,
    }
    finish(result, arguments.out)


if __name__ == "__main__":
    main()
