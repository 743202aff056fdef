"""GPUs that trainings share: slots of a global concurrency limit in Prefect, if its server has one of that name.

``prefect gcl create gpu --limit 8`` makes the limit for eight GPUs; without it, nothing waits for anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from prompt_diffusion.device import AUTO, takes_gpu
from prompt_diffusion.engine.config import TrainResources

GPU_LIMIT = "gpu"
_LEASE_SECONDS = 300.0


@contextmanager
def occupy_gpus(resources: TrainResources) -> Iterator[None]:
    """Hold one slot per process while the block runs, waiting until they are free; ValueError if the limit is too small.

    Prefect renews the lease in a thread. If this process dies, the slots are free again within five minutes.
    """
    limit = read_gpu_limit() if uses_gpus(resources) else None
    if limit is None:
        yield
        return
    if limit < resources.num_processes:
        raise ValueError(
            f"{resources.num_processes} processes need a GPU each, and the concurrency limit {GPU_LIMIT!r} has {limit} slots: "
            f"lower num_processes, or raise it with `prefect gcl update {GPU_LIMIT} --limit {resources.num_processes}`"
        )
    # A failed renewal does not end the training: that would cost more than a slot given out twice.
    with concurrency(
        GPU_LIMIT,
        occupy=resources.num_processes,
        lease_duration=_LEASE_SECONDS,
        raise_on_lease_renewal_failure=False,
    ):
        yield


def uses_gpus(resources: TrainResources) -> bool:
    """Say whether a training takes GPUs: 'auto' does if this machine has one; on Ray's machines that is not known."""
    return takes_gpu(resources.device) and (resources.device != AUTO or resources.engine == "local")


def read_gpu_limit() -> int | None:
    """Return the slots of the limit, None if the server has none or it is not active."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            return None
    return limit.limit if limit.active else None
