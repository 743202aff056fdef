"""A stage as a program of its own, so that a test can kill it: `interrupted_stage.py ROOT NUM_SHARDS KILL_AFTER`.

Runs a sharded stage with rows drawn from the shard's index, and prints each index when it makes it. After KILL_AFTER
shards it kills itself with SIGKILL, which no handler and no `finally` sees; never if that is negative.
"""

import os
import random
import signal
import sys

import pyarrow as pa

from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.records import ShardProgress
from prompt_diffusion.store.sharded import ShardRows, run_sharded_stage


def main(root: str, num_shards: int, kill_after: int) -> None:
    """Run the stage."""

    def make_shard(index: int) -> ShardRows:
        print(index, flush=True)  # noqa: T201
        draw = random.Random(index)
        images = [draw.randbytes(8000) for _ in range(150)]
        rejects = [Reject(sample_id=f"sample-{index}", reason="its image is truncated")] if index % 2 else []
        return pa.table({"sample_id": [f"{index}-{row}" for row in range(150)], "image": images}), rejects

    def kill_when_due(told: ShardProgress) -> None:
        if told.num_done == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    identity = StageIdentity(stage="interrupted", version=1, config={"num_shards": num_shards}, inputs=())
    run_sharded_stage(identity, root, num_shards, make_shard, on_progress=kill_when_due)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
