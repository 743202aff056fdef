"""Kills the smoke run at random moments, over all of its stages, and looks at what is left: ``make faults``.

One run is left alone: the reference. Then, in a folder of its own, the same command is started, killed by SIGKILL at a moment
drawn from the seed, started again, and so on, until it ends before its kill; then a fresh folder is taken, until there were
as many kills as asked for. Of each folder must hold: the sealed bytes are the reference's, the registry has one version, no run
of MLflow is left running, no process outlives its launcher, and the store holds nothing but what is sealed.

Run it alone: ``python tests/faults/kill_loop.py --kills 18 --seed 3``. Its last line is one JSON object; it exits with 1 where
something does not hold.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.local_files import TEMPORARY_SUFFIX
from prompt_diffusion.store.manifest import MANIFEST_NAME

MARK = "PROMPT_DIFFUSION_KILL_LOOP"
ORPHAN_SECONDS = 180  # a training ends its step and writes a checkpoint once its launcher is gone
_DATED = ("benchmark",)  # whose table says when it was made


@dataclass
class Room:
    """The folder of one run: its store, its caches, its databases, and its log."""

    path: Path
    kills: list[str] = field(default_factory=list)

    @property
    def store(self) -> Path:
        """The store."""
        return self.path / "store"

    @property
    def log(self) -> Path:
        """What the run printed, all attempts one after the other."""
        return self.path / "log"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which nothing lies outside of the folder, and every process is marked as this room's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        return kept | {
            MARK: str(self.path),
            "PROMPT_DIFFUSION_STORE": str(self.store),
            "PROMPT_DIFFUSION_CACHE_DIR": str(self.path / "cache"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.path}/mlflow.db",
            "TMPDIR": str(self.path / "tmp"),
            "OMP_NUM_THREADS": "1",
            "DO_NOT_TRACK": "1",
        }

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the smoke run."""
        (self.path / "tmp").mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-c",
            "from prompt_diffusion.cli import main; main()",
            "demo",
            "--preset",
            "smoke",
            "--verbose",
        ]
        with self.log.open("ab") as sink:
            return subprocess.Popen(
                command, stdout=sink, stderr=sink, cwd=self.path, env=self.environment, start_new_session=True
            )

    def find_processes(self) -> list[int]:
        """Return every living process of this room."""
        mark = f"{MARK}={self.path}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def find_stage(self) -> str:
        """Return what the run is at: the stages that have begun and are not sealed, or what was sealed last."""
        folders = [folder for folder in self.store.glob("*/*") if folder.is_dir()]
        open_ones = sorted({folder.parent.name for folder in folders if not (folder / MANIFEST_NAME).exists()})
        if open_ones:
            return "+".join(open_ones)
        sealed = [(folder / MANIFEST_NAME).stat().st_mtime_ns for folder in folders]
        return f"after {max(zip(sealed, folders, strict=True))[1].parent.name}" if folders else "before the first stage"

    def digest_sealed(self) -> dict[str, str]:
        """Return the digest of every file of a sealed folder, but of those that say when they were made."""
        return {
            str(path.relative_to(self.store)): compute_digest(path.read_bytes())
            for manifest in self.store.glob(f"*/*/{MANIFEST_NAME}")
            for path in sorted(manifest.parent.rglob("*"))
            if path.is_file() and manifest.parent.parent.name not in _DATED and not path.name.startswith("run-")
        }


def wait_for_orphans(room: Room) -> list[int]:
    """Return the processes that are still there after the time in which each must have ended by itself; kill them."""
    give_up = time.monotonic() + ORPHAN_SECONDS
    while (left := room.find_processes()) and time.monotonic() < give_up:
        time.sleep(0.5)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def kill_once(room: Room, moment: float, everything: bool) -> bool:
    """Start the run and kill it after so many seconds, alone or with all of its processes; False where it ended before."""
    process = room.start()
    try:
        code = process.wait(moment)
    except subprocess.TimeoutExpired:
        stage = room.find_stage()
        room.kills.append(stage)
        victims = room.find_processes() if everything else [process.pid]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        print(f"  killed {'all' if everything else 'it alone'} after {moment:.1f} s: {stage}", flush=True)
        return True
    if code != 0:
        raise RuntimeError(f"the run ended with exit code {code}: {room.log.read_text()[-3000:]}")
    return False


def find_faults(room: Room, reference: dict[str, str]) -> list[str]:
    """Return, one sentence each, what does not hold of a finished room."""
    found = room.digest_sealed()
    faults = [
        f"{path} is {'missing' if path not in found else 'new' if path not in reference else 'other'}"
        for path in sorted(found.keys() | reference.keys())
        if found.get(path) != reference.get(path)
    ]
    leftovers = [
        str(path) for path in room.store.rglob("*") if path.name.endswith(TEMPORARY_SUFFIX) or ".probe-" in path.name
    ]
    leftovers += [str(path.parent) for path in room.store.glob("*/*/*") if not (path.parent / MANIFEST_NAME).exists()]
    faults += [f"left behind: {path}" for path in sorted(set(leftovers))]
    return faults + find_tracking_faults(room)


def find_tracking_faults(room: Room) -> list[str]:
    """Return what does not hold of MLflow's runs and versions; asked in a process of its own, as MLflow keeps state."""
    code = (
        "import json, os; from mlflow import MlflowClient; c = MlflowClient(os.environ['MLFLOW_TRACKING_URI']);"
        "e = [each.experiment_id for each in c.search_experiments()];"
        "r = [(run.info.run_name, run.info.status) for run in c.search_runs(e)];"
        "v = [(each.name, each.version) for each in c.search_model_versions('')];"
        "print(json.dumps([r, v]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=room.environment, capture_output=True, text=True, check=False, cwd=room.path
    )
    if result.returncode != 0:
        return [f"MLflow's database cannot be asked: {result.stderr.strip().splitlines()[-1]}"]
    runs, versions = json.loads(result.stdout.splitlines()[-1])
    faults = [f"MLflow's run {name} is left {status}" for name, status in runs if status != "FINISHED"]
    return faults + ([] if len(versions) == 1 else [f"the registry has {len(versions)} versions: {versions}"])


def main() -> int:
    """Run the loop; 0 where everything holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where to work; it is kept. Default: a temporary folder, deleted.")
    arguments = parser.parse_args()
    root = (arguments.folder or Path(tempfile.mkdtemp(prefix="kill-loop-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    draw, started = random.Random(arguments.seed), time.monotonic()
    try:
        reference = Room(root / "reference")
        begun = time.monotonic()
        code = reference.start().wait()
        seconds = time.monotonic() - begun
        if code != 0:
            raise RuntimeError(f"the run that was left alone failed: {reference.log.read_text()[-3000:]}")
        expected = reference.digest_sealed()
        faults = find_faults(reference, expected)
        print(f"the reference: {seconds:.1f} s, {len(expected)} sealed files", flush=True)
        hit: Counter[str] = Counter()
        num_kills, number = 0, 0
        while num_kills < arguments.kills:
            number += 1
            room = Room(root / f"room-{number}")
            print(f"room {number}", flush=True)
            # Each start goes on where the last one stopped, so that kills reach the later stages, too.
            while num_kills < arguments.kills and kill_once(room, draw.uniform(0.5, seconds), draw.random() < 0.3):
                num_kills += 1
                hit[room.kills[-1]] += 1
                faults += [f"room {number}: process {pid} outlived its launcher" for pid in wait_for_orphans(room)]
            code = room.start().wait()
            faults += [f"room {number}: exit code {code}: {room.log.read_text()[-2000:]}"] if code else []
            faults += [f"room {number}: {fault}" for fault in find_faults(room, expected)]
        for fault in faults:
            print(f"FAULT {fault}", flush=True)
        facts = {
            "kills": num_kills, "rooms": number, "stages_hit": dict(sorted(hit.items())), "seed": arguments.seed,
            "reference_seconds": round(seconds, 1), "seconds": round(time.monotonic() - started, 1), "faults": faults,
        }  # fmt: skip
        print(json.dumps(facts))
        return 1 if faults else 0
    finally:
        if arguments.folder is None:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
