"""A switch that records a few training steps with torch.profiler, for ui.perfetto.dev or chrome://tracing."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.store.storage import write_from
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)


@contextmanager
def profile_steps(
    folder: str, first_step: int, resources: TrainResources, world: World
) -> Iterator[Callable[[], None]]:
    """Yield a function to call after every step; on the main process it records ``resources.profile_steps`` of them.

    The first two steps of the process are left out: in the first, memory is allocated and kernels are compiled; in the second,
    the profiler warms up. The trace is written to ``folder`` (a URI) as ``trace-00000005.json.gz``, the number being the last
    recorded step; a run that ends earlier writes the steps that it recorded. ``first_step``: steps done before the loop.
    """
    if resources.profile_steps is None or not world.is_main:
        yield lambda: None
        return

    def write_trace(profiler: profile) -> None:
        uri = join_uri(folder, f"trace-{first_step + profiler.step_num:08d}.json.gz")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "trace.json.gz")
            profiler.export_chrome_trace(str(path))
            write_from(uri, path)
        logger.info("trace of %d steps: %s", resources.profile_steps, uri)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    steps = schedule(wait=1, warmup=1, active=resources.profile_steps, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write_trace) as profiler:
        yield profiler.step
