"""Two runs of one training, with a checkpoint at every step: no run meets the other's files, and the bytes are the same."""

import signal

import pytest

from tests.training.test_resume import PROGRAM, read_events, read_result, whole, write_spec
from tests.warm import WarmProcess, run_module

__all__ = ["whole"]  # a fixture

pytestmark = pytest.mark.slow


@pytest.fixture
def spec(train_inputs, tiny_config, tmp_path):
    return write_spec(tiny_config, train_inputs, tmp_path, checkpoint_every_seconds=1e-6)


def test_of_two_runs_at_once_one_trains_and_both_return_what_it_sealed(
    whole, train_inputs, tiny_config, tmp_path, spec
):
    both = [WarmProcess(run_module, PROGRAM, spec) for _ in range(2)]
    events = [list(read_events(process)) for process in both]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(any(event["kind"] == "step" for event in each) for each in events) == [False, True]
    assert events[0][-1] == events[1][-1]
    assert events[0][-1]["kind"] == "sealed"
    check_result(whole, tiny_config, train_inputs, tmp_path)


def test_the_second_goes_on_where_the_first_was_killed(whole, train_inputs, tiny_config, tmp_path, spec):
    first = WarmProcess(run_module, PROGRAM, spec)
    told = read_events(first)
    next(event for event in told if event.get("step", 0) >= 2)
    second = WarmProcess(run_module, PROGRAM, spec)
    next(event for event in told if event.get("step", 0) >= 4)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    steps = [event["step"] for event in read_events(second) if event["kind"] == "step"]
    assert second.wait() == 0
    assert steps[0] > 1, "it began at the beginning"
    check_result(whole, tiny_config, train_inputs, tmp_path)


def check_result(whole, config, inputs, folder):
    weights, losses, grid = read_result(config, inputs, str(folder))
    assert losses == whole[1]
    assert grid == whole[2]
    for part, expected in whole[0].items():
        assert all((weights[part][name] == value).all() for name, value in expected.items())
    assert list(folder.rglob("lease-*")) == []
