"""Trainings on GPUs wait for each other where the server has the limit, against a real server."""

import threading
import time
from collections.abc import Iterator

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.testing.utilities import prefect_test_harness

from prompt_diffusion.engine.config import TrainResources
from tasks.slots import GPU_LIMIT, occupy_gpus, uses_gpus

FOUR = TrainResources(device="cuda", num_processes=4)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture
def limit() -> Iterator[None]:
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=6))
        yield
        client.delete_global_concurrency_limit_by_name(GPU_LIMIT)


def count_taken() -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots


def test_without_the_limit_nothing_waits() -> None:
    with occupy_gpus(FOUR), occupy_gpus(FOUR):
        pass


@pytest.mark.usefixtures("limit")
def test_a_training_holds_a_slot_a_process_while_it_runs_and_another_waits_for_them() -> None:
    second_runs = threading.Event()

    def run_second() -> None:
        with occupy_gpus(FOUR):
            second_runs.set()

    second = threading.Thread(target=run_second)
    with occupy_gpus(FOUR):
        assert count_taken() == 4
        second.start()
        assert not second_runs.wait(2)
    assert second_runs.wait(60)
    second.join()
    assert count_taken() == 0


@pytest.mark.usefixtures("limit")
def test_a_training_on_cpus_takes_none() -> None:
    with occupy_gpus(TrainResources(device="cpu", num_processes=4)):
        assert count_taken() == 0


@pytest.mark.usefixtures("limit")
def test_more_processes_than_slots_are_refused_instead_of_waiting_for_ever() -> None:
    started = time.monotonic()
    many = TrainResources(device="cuda", num_processes=8)
    sentence = "8 processes need a GPU each, and the concurrency limit 'gpu' has 6 slots"
    with pytest.raises(ValueError, match=sentence), occupy_gpus(many):
        raise AssertionError("it began")
    assert time.monotonic() - started < 30


def test_on_ray_only_a_device_that_is_named_counts() -> None:
    assert not uses_gpus(TrainResources(engine="ray"))
    assert uses_gpus(TrainResources(engine="ray", device="cuda"))
