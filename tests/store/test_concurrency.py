import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from prompt_diffusion.store.concurrency import map_ahead


def test_results_come_in_order_however_long_each_takes() -> None:
    def slow_when_even(number: int) -> int:
        time.sleep(0.02 if number % 2 == 0 else 0)
        return number * number

    with ThreadPoolExecutor(4) as pool:
        assert list(map_ahead(pool, slow_when_even, range(20), 5)) == [number * number for number in range(20)]


def test_no_more_than_the_bound_is_read_ahead() -> None:
    read: list[int] = []

    def give() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        ahead = [len(read) - taken for taken, _ in enumerate(map_ahead(pool, abs, give(), 3))]
    assert len(ahead) == 50
    assert max(ahead) == 3


def test_work_overlaps_the_callers_own() -> None:
    both_at_work = threading.Barrier(2)

    def meet(number: int) -> int:
        if number == 1:
            both_at_work.wait()
        return number

    with ThreadPoolExecutor(1) as pool:
        results = map_ahead(pool, meet, range(4), 2)
        assert next(results) == 0
        both_at_work.wait()  # the second is under way while the first is in the caller's hands
        assert list(results) == [1, 2, 3]


def test_the_first_error_ends_it_and_what_has_not_begun_never_does() -> None:
    begun: list[int] = []

    def fail_at_two(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    with ThreadPoolExecutor(1) as pool:
        results = map_ahead(pool, fail_at_two, range(100), 4)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)
    assert max(begun) <= 5
