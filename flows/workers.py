"""The workers that share a fan-out: threads of this process, one a device, or a Ray cluster; the same tasks on both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prompt_diffusion.presets import FanOut

Workers = TaskRunner[Any]  # each kind of runner has futures of its own kind


@contextmanager
def start_workers(fan_out: FanOut) -> Iterator[Workers]:
    """Give a started task runner; ValueError where Ray was asked for and is not installed.

    Ray runs a part again whose worker died; what it had finished lies in the store, and is found there.
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
