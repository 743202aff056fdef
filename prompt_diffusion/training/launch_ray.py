"""Training on many machines: ``python -m prompt_diffusion.training.launch_ray SPEC.json`` drives Ray Train's workers.

This process prints the same events as ``run`` and has the same exit codes. Where a worker is lost, Ray restarts all of them,
and they resume from the newest checkpoint in the store, the only storage that they share. An actor passes events one way and
the request to stop the other.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from prompt_diffusion.device import AUTO
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import ErrorEvent, Event, SealedEvent, parse_event
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.store.storage import read_bytes
from prompt_diffusion.training.launch import MAX_RESTARTS, STOPPED_EXIT_CODE
from prompt_diffusion.training.run import LOG_FORMAT, USER_ERROR, USER_ERRORS, emit, end_with_launcher
from prompt_diffusion.training.stage import Train, TrainSpec
from prompt_diffusion.training.train import run_train

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_CONNECT = 10.0
_OBJECT_STORE_BYTES = 1 << 27  # of a local cluster: nothing large passes through it


class Mailbox:
    """The actor between the driver and the workers; events pass through it as JSON."""

    def __init__(self) -> None:
        self._events: list[str] = []
        self._is_stopping = False

    def post(self, event: str) -> None:
        """Keep an event for the driver."""
        self._events.append(event)

    def collect(self, stop: bool) -> list[str]:
        """Return the events since the last call; ``stop`` asks the workers to save and stop."""
        self._is_stopping = self._is_stopping or stop
        events, self._events = self._events, []
        return events

    def is_stopping(self) -> bool:
        """Return whether the workers are asked to stop."""
        return self._is_stopping


def main(spec_uri: str) -> int:
    """Train as the specification says, with the exit codes of ``run``."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    spec = TrainSpec.model_validate_json(read_bytes(spec_uri))
    end_with_launcher()
    # Ray prints its workers' output on standard output, which is for events alone.
    stream = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            with _join_cluster(spec.resources), tempfile.TemporaryDirectory() as folder:
                return _drive(spec, folder, stream)
        except (ValueError, ConnectionError) as error:
            emit(ErrorEvent(message=str(error)), stream)
            return USER_ERROR


def _drive(spec: TrainSpec, folder: str, stream: TextIO) -> int:
    """Run the workers to their end, passing their events on, and return the exit code.

    ``folder`` is Ray Train's own storage: its workers never read it, since nothing is saved through Ray.
    """
    stop_requested = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own handlers would end the workers at once
        signal.signal(number, lambda *_: stop_requested.set())
    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    scaling = _scale(spec.resources)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"spec": spec.model_dump_json(), "mailbox": mailbox},
        # as in ``join_world``: tensors on the CPU are reduced by gloo in either case
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=MAX_RESTARTS)),
    )
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # of any kind: the main thread reports it
            failures.append(error)

    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    is_sealed = False
    while True:
        is_last = not fitting.is_alive()
        for line in ray.get(mailbox.collect.remote(stop_requested.is_set())):
            event = parse_event(line)
            assert event is not None, f"a worker posted {line!r}, which is not an event"
            emit(event, stream)
            is_sealed = is_sealed or isinstance(event, SealedEvent)
            if isinstance(event, ErrorEvent):
                return USER_ERROR  # the other workers wait for the one that left: they end with this process
        if is_last:
            break
        fitting.join(_SECONDS_BETWEEN_LOOKS)
    if failures:
        logger.error("Ray Train gave up: %s", failures[0])
        return 1
    return 0 if is_sealed else STOPPED_EXIT_CODE


def _train_worker(task: dict[str, Any]) -> None:
    """Train as one of Ray Train's workers, which have joined a process group already."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    spec, mailbox = TrainSpec.model_validate_json(task["spec"]), task["mailbox"]
    torch.set_num_threads(spec.resources.threads_per_process)
    world = World(get_context().get_world_rank(), get_context().get_world_size(), get_device())

    def post(event: Event) -> None:
        ray.get(mailbox.post.remote(event.model_dump_json()))

    def watch() -> None:
        while not ray.get(mailbox.is_stopping.remote()):
            time.sleep(1.0)
        world.stop_requested.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        ref = run_train(Train(spec.config, spec.inputs), spec.store_root, spec.resources, world, post)
    except Stopped as stopped:
        logger.info("%s", stopped)
    except USER_ERRORS as error:
        post(ErrorEvent(message=str(error)))  # not raised: Ray would retry
    else:
        if ref is not None and world.is_main:
            post(SealedEvent(manifest=ref))


def _scale(resources: TrainResources) -> ScalingConfig:
    """Return the number of workers and the resources of each; ValueError where a local cluster has too few GPUs."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    use_gpu = resources.device.startswith("cuda") or (resources.device == AUTO and num_gpus > 0)
    if use_gpu and resources.ray_address is None and num_gpus < resources.num_processes:
        raise ValueError(
            f"{resources.num_processes} processes need a GPU each and this machine has {num_gpus}: name a cluster by "
            "ray_address, lower num_processes, or set device to 'cpu'"
        )
    each = {"CPU": resources.threads_per_process} | ({"GPU": 1} if use_gpu else {})
    return ScalingConfig(num_workers=resources.num_processes, use_gpu=use_gpu, resources_per_worker=each)


@contextmanager
def _join_cluster(resources: TrainResources) -> Iterator[None]:
    """Join the cluster at the address, or start one on this machine, just large enough for the training."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in the workers
    if resources.ray_address is not None:
        _check_address(resources.ray_address)
        ray.init(address=resources.ray_address, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=resources.num_processes * resources.threads_per_process,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise ValueError where nothing listens at a cluster's address: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like: no address, so Ray looks on this machine alone
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster answers at ray_address {address!r}: {error}") from error


if __name__ == "__main__":
    # Imported under its own name: Ray sends the worker's function by reference, and ``__main__`` is another module there.
    from prompt_diffusion.training import launch_ray

    sys.exit(launch_ray.main(sys.argv[1]))
