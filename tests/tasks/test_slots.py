"""Trainings on GPUs wait for each other where the server has the limit, against a real server."""

import contextvars
import logging
import threading
from collections.abc import Iterator

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from prompt_diffusion.engine.config import TrainResources
from tasks.slots import GPU_LIMIT, occupy_gpus, read_gpu_limit, uses_gpus

FOUR = TrainResources(device="cuda", num_processes=4)


@pytest.fixture(scope="module", autouse=True)
def server(prefect_environment: dict[str, str]) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_environment["PREFECT_API_URL"]}):
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


def test_without_the_limit_a_second_training_runs_beside_the_first() -> None:
    assert read_gpu_limit() is None
    running = []
    with occupy_gpus(FOUR):
        running.append("first")
        with occupy_gpus(FOUR):
            running.append("second")
    assert running == ["first", "second"]


@pytest.fixture
def refusals() -> Iterator[threading.Event]:
    """Return what is set once the server has refused somebody a slot for now."""
    refused = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "423 Locked" in record.getMessage():
                refused.set()

    logger, listener = logging.getLogger("httpx"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    yield refused
    logger.removeHandler(listener)
    logger.setLevel(level)


@pytest.mark.usefixtures("limit")
def test_a_training_holds_a_slot_a_process_while_it_runs_and_gives_them_back() -> None:
    with occupy_gpus(FOUR):
        assert count_taken() == 4
    assert count_taken() == 0


@pytest.mark.usefixtures("limit")
def test_a_training_waits_for_the_slots_of_another(refusals: threading.Event) -> None:
    told: list[str] = []

    def run_second() -> None:
        with occupy_gpus(FOUR):
            told.append("the second runs")

    # Prefect's settings are the context's, which a thread does not inherit.
    second = threading.Thread(target=contextvars.copy_context().run, args=(run_second,))
    with occupy_gpus(FOUR):
        second.start()
        refusals.wait()
        told.append("the first ends")
    second.join()
    assert told == ["the first ends", "the second runs"]


@pytest.mark.usefixtures("limit")
def test_a_training_on_cpus_takes_none() -> None:
    with occupy_gpus(TrainResources(device="cpu", num_processes=4)):
        assert count_taken() == 0


@pytest.mark.usefixtures("limit")
def test_more_processes_than_slots_are_refused_instead_of_waiting_for_ever() -> None:
    many = TrainResources(device="cuda", num_processes=8)
    sentence = "8 processes need a GPU each, and the concurrency limit 'gpu' has 6 slots"
    with pytest.raises(ValueError, match=sentence), occupy_gpus(many):
        raise AssertionError("it began")


def test_on_ray_only_a_device_that_is_named_counts() -> None:
    assert not uses_gpus(TrainResources(engine="ray"))
    assert uses_gpus(TrainResources(engine="ray", device="cuda"))
