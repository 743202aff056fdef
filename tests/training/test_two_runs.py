"""Two runs of one training, with a checkpoint at every step: no run meets the other's files, and the bytes are the same."""

import signal

from tests.training.test_resume import read_events, read_result, resources, start, whole

__all__ = ["resources", "whole"]  # fixtures


def test_of_two_runs_at_once_one_trains_and_both_return_what_it_sealed(
    whole, train_inputs, tiny_config, tmp_path, resources
):
    both = [start(tiny_config, train_inputs, str(tmp_path), tmp_path, resources) for _ in range(2)]
    events = [list(read_events(process)) for process in both]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(any("step" in event for event in each) for each in events) == [False, True]
    assert events[0][-1] == events[1][-1]
    assert events[0][-1]["kind"] == "sealed"
    _check(whole, tiny_config, train_inputs, tmp_path)


def test_the_second_goes_on_where_the_first_was_killed(whole, train_inputs, tiny_config, tmp_path, resources):
    first = start(tiny_config, train_inputs, str(tmp_path), tmp_path, resources)
    next(event for event in read_events(first) if event.get("step", 0) >= 2)
    second = start(tiny_config, train_inputs, str(tmp_path), tmp_path, resources)
    next(event for event in read_events(first) if event.get("step", 0) >= 4)
    first.send_signal(signal.SIGKILL)
    first.stdout.read()
    assert first.wait() == -signal.SIGKILL
    steps = [event["step"] for event in read_events(second) if "step" in event]
    assert second.wait() == 0
    assert steps[0] > 1, "it began at the beginning"
    _check(whole, tiny_config, train_inputs, tmp_path)


def _check(whole, config, inputs, folder):
    weights, losses, grid = read_result(config, inputs, str(folder))
    assert losses == whole[1]
    assert grid == whole[2]
    for part, expected in whole[0].items():
        assert all((weights[part][name] == value).all() for name, value in expected.items())
    assert list(folder.rglob("lease-*")) == []
