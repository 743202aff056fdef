"""What the benchmarks share: taking turns on one clock, and the one JSON object that each prints last."""

import json
import os
import platform
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def take_turns(
    rounds: int, paths: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Run each path once unmeasured, then all of them in turn; return the seconds of each round by a clock.

    ``time.process_time`` leaves out what other processes took of a shared CPU, and knows nothing of a GPU.
    """
    for run in paths.values():
        run()
        synchronise()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, run in paths.items():
            started = clock()
            run()
            synchronise()
            seconds[name].append(clock() - started)
    return seconds


def synchronise() -> None:
    """Wait until a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(seconds: Mapping[str, list[float]], items: float = 1.0) -> dict[str, Any]:
    """Return ratio (above 1: ours is faster), the medians and the spread; with ``items``, rates instead of seconds."""
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    medians = {name: statistics.median(seconds[name]) for name in ("ours", "peer")}
    shown = {name: value if items == 1.0 else items / value for name, value in medians.items()}
    return {
        "ratio": round(statistics.median(ratios), 2),
        **{name: round(value, 4) for name, value in shown.items()},
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def describe_device() -> str:
    """Return the GPU's name, or the CPU and the threads that torch may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def find_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def add_out_option(parser: ArgumentParser) -> None:
    """Add --out, which every benchmark has."""
    parser.add_argument("--out", type=Path, help="keep the JSON in this file, too")


def finish(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result as the last line, and keep it."""
    text = json.dumps(result)
    if out is not None:
        out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
