"""A stage as a program of its own that kills itself: ``interrupted_stage.py ROOT NUM_SHARDS KILL_AFTER [KILL_DELAY]``.

Runs a sharded stage with rows drawn from the shard's index, and prints each index when it makes it. After KILL_AFTER
shards it kills itself with SIGKILL, which no handler and no ``finally`` sees; never if that is negative. With KILL_DELAY it
does so that many seconds after it begins the first shard that is missing, and never comes to the end of the last.
"""

import os
import random
import signal
import sys
import threading

import pyarrow as pa

from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.records import ShardProgress
from prompt_diffusion.store.sharded import ShardRows, run_sharded_stage


def kill_self() -> None:
    """End as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: str, num_shards: int, kill_after: int, kill_delay: float | None = None) -> None:
    """Run the stage."""
    made: list[int] = []

    def make_shard(index: int) -> ShardRows:
        print(index, flush=True)  # noqa: T201
        if kill_delay is not None and not made:
            threading.Timer(kill_delay, kill_self).start()
        made.append(index)
        if kill_delay is not None and index == num_shards - 1:
            threading.Event().wait()
        draw = random.Random(index)
        images = [draw.randbytes(8000) for _ in range(150)]
        rejects = [Reject(sample_id=f"sample-{index}", reason="its image is truncated")] if index % 2 else []
        return pa.table({"sample_id": [f"{index}-{row}" for row in range(150)], "image": images}), rejects

    def kill_when_due(told: ShardProgress) -> None:
        if told.num_done == kill_after:
            kill_self()

    identity = StageIdentity(stage="interrupted", version=1, config={"num_shards": num_shards}, inputs=())
    run_sharded_stage(identity, root, num_shards, make_shard, on_progress=kill_when_due)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
