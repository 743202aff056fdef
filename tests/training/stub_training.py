"""Stands in for python where it would train: what the launching process sees of a training, without torch.

``build_stub`` makes the program that a test puts in the place of ``sys.executable``. torchrun is the real one and runs this
file in place of a training. What a stub does is told by the variable STUB_TRAINING:

- ``steps``: tell a step again and again until SIGTERM, then write what was reached to ``saved-RANK`` (``began-RANK`` is there
  from the start) and leave as a training does;
- ``deaf``: the same, but nothing but SIGKILL ends it;
- ``mistake``: tell a user's mistake, in one sentence; ``sealed``: tell of a sealed reference, between other lines;
- a number: end with that exit code.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

VARIABLE = "STUB_TRAINING"
SENTENCE = "prediction_type is 'epsilon', but base is of another kind"
STEP = {
    "step": 1,
    "num_steps": 10,
    "loss": 1.0,
    "losses": {},
    "gradient_norm": 1.0,
    "learning_rate_factor": 1.0,
    "num_skipped": 0,
    "samples_per_second": 1.0,
    "eta_seconds": 9.0,
    "device_memory_bytes": 1,
    "gigaflop_per_sample": None,
    "model_flops_per_second": None,
}
SEALED = {"uri": "/store/train/abc", "stage": "train", "fingerprint": "abc", "rows": 10}


def build_stub(folder: Path) -> str:
    """Return the path of a program that is called as python is."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} "$@"\n')
    program.chmod(0o755)
    return str(program)


def tell(kind: str, **event: object) -> None:
    print(json.dumps({"kind": kind, **event}), flush=True)  # noqa: T201


def take_steps(spec: Path, is_deaf: bool) -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: None if is_deaf else stopped.append(True))
    rank, step = os.environ.get("RANK", "0"), 0
    (spec.parent / f"began-{rank}").touch()
    while not stopped:
        step += 1
        if rank == "0":
            tell("step", **(STEP | {"step": step}))
        time.sleep(0.005)
    (spec.parent / f"saved-{rank}").write_text(str(step))
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75


def main(arguments: list[str]) -> int:
    if "torch.distributed.run" in arguments:
        *options, _, _, spec = arguments  # -m and the module that trains
        os.execv(sys.executable, [sys.executable, *options, __file__, spec])
    spec, what = Path(arguments[-1]), os.environ[VARIABLE]
    if what in ("steps", "deaf"):
        return take_steps(spec, what == "deaf")
    if what == "mistake":
        if os.environ.get("RANK", "0") == "0":
            tell("error", message=SENTENCE)
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 2
    if what == "sealed":
        print("a library's own words\n[1, 2]")  # noqa: T201
        tell("step", **STEP)
        tell("sealed", manifest=SEALED)
        return 0
    return int(what)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
