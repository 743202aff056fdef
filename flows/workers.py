"""The workers that share a fan-out: threads of this process, one per device, or a Ray cluster; the same tasks on both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prompt_diffusion.presets import FanOut

Workers = TaskRunner[Any]  # each kind of runner has futures of its own kind


@contextmanager
def start_workers(fan_out: FanOut) -> Iterator[Workers]:
    """Yield a started task runner; ValueError if Ray was requested and is not installed.

    Ray reruns a part whose worker died; what it had finished is found in the store.
    """
    if fan_out.engine == "threads":
        pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=max(1, len(fan_out.devices)))
        with pool as workers:
            yield workers
        return
    try:
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError as error:
        raise ValueError(f"the engine 'ray' needs the extra 'ray', which is not installed here ({error})") from error
    options = {"num_gpus": fan_out.gpus_per_part, "num_cpus": fan_out.cpus_per_part}
    with RayTaskRunner(address=fan_out.ray_address) as workers, remote_options(**options):
        yield workers
