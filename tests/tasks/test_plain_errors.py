"""A user's mistake is told by its sentence in a run's log, and a bug with its traceback."""

import io
import logging
from collections.abc import Iterator

import pytest

import tasks.plain_errors
from prompt_diffusion.store.retries import StoreError


@pytest.fixture(params=["prefect.flow_runs", "prefect.task_runs", "prefect.engine"])
def log(request: pytest.FixtureRequest) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """Give one of Prefect's loggers, and what it writes."""
    logger, sink = logging.getLogger(request.param), io.StringIO()
    handler = logging.StreamHandler(sink)
    level = logger.level
    logger.addHandler(handler)
    yield logger, sink
    logger.removeHandler(handler)
    logger.setLevel(level)


def tell(logger: logging.Logger, error: Exception) -> None:
    try:
        raise error
    except type(error):
        logger.exception("Encountered exception during execution: %r", error)


@pytest.mark.parametrize(
    "error", [ValueError("too many rejects"), FileNotFoundError("no file"), ImportError("no gcsfs")]
)
def test_a_users_mistake_is_one_line(log: tuple[logging.Logger, io.StringIO], error: Exception) -> None:
    logger, sink = log
    logger.setLevel(logging.INFO)
    tell(logger, error)
    assert sink.getvalue() == f"Encountered exception during execution: {error!r}\n"


@pytest.mark.parametrize("error", [RuntimeError("bug"), StoreError("lost"), ConnectionError("lost"), KeyError("bug")])
def test_everything_else_keeps_its_traceback(log: tuple[logging.Logger, io.StringIO], error: Exception) -> None:
    logger, sink = log
    logger.setLevel(logging.INFO)
    tell(logger, error)
    assert "Traceback" in sink.getvalue()


def test_the_traceback_is_there_for_those_who_ask(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, sink = log
    logger.setLevel(logging.DEBUG)
    tell(logger, ValueError("too many rejects"))
    assert "Traceback" in sink.getvalue()


def test_installing_again_is_as_once() -> None:
    tasks.plain_errors.install()
    filters = logging.getLogger("prefect.flow_runs").filters
    assert sum(isinstance(known, tasks.plain_errors.PlainErrors) for known in filters) == 1
