"""The memory budget of decoded media: never exceeded, granted in order of arrival, always released."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.servers import eventually
from worker.errors import DeadlineExceeded
from worker.media.budget import MemoryBudget, Reservation


def go_on() -> None:
    """Nobody gives up."""


def test_many_jobs_never_hold_more_than_there_is() -> None:
    budget, lock = MemoryBudget(1000), threading.Lock()
    held_now, most, done = 0, 0, 0

    def job(num_bytes: int) -> None:
        nonlocal held_now, most, done
        with budget.reserve(num_bytes, should_stop=go_on) as reservation:
            with lock:
                held_now += num_bytes
                most = max(most, held_now)
            time.sleep(0.001)
            with lock:
                held_now -= num_bytes // 2
            reservation.shrink(num_bytes - num_bytes // 2)
            with lock:
                held_now -= num_bytes - num_bytes // 2
                done += 1

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(job, [100, 400, 1000, 7, 300] * 40))
    assert done == 200
    assert 300 < most <= 1000
    assert budget.stats().num_bytes == budget.stats().num_waiting == 0


def test_a_large_job_is_not_overtaken() -> None:
    budget = MemoryBudget(10)
    order: list[str] = []

    def job(name: str, num_bytes: int) -> None:
        with budget.reserve(num_bytes, should_stop=go_on):
            order.append(name)

    with ThreadPoolExecutor(2) as threads:
        with budget.reserve(6, should_stop=go_on):
            threads.submit(job, "large", 10)
            eventually(lambda: budget.stats().num_waiting == 1, what="the large job waits")
            threads.submit(job, "small", 1)
            eventually(lambda: budget.stats().num_waiting == 2, what="the small job waits behind it")
            job("text", 0)
            assert order == ["text"]
        eventually(lambda: order == ["text", "large", "small"], what="both went")
    assert budget.stats().num_waited == 2


def test_a_job_that_gives_up_lets_the_next_one_go() -> None:
    budget, is_late = MemoryBudget(10), threading.Event()

    def give_up() -> None:
        if is_late.is_set():
            raise DeadlineExceeded("too late")

    with budget.reserve(1, should_stop=go_on), ThreadPoolExecutor(2) as threads:
        large = threads.submit(budget.reserve, 10, should_stop=give_up)
        eventually(lambda: budget.stats().num_waiting == 1, what="the large job waits")
        small = threads.submit(budget.reserve, 1, should_stop=go_on)
        is_late.set()
        with pytest.raises(DeadlineExceeded):
            large.result(10)
        with small.result(10):
            assert budget.stats().num_bytes == 2
    assert budget.stats().num_bytes == 0


def test_a_job_that_breaks_releases_its_share() -> None:
    budget = MemoryBudget(10)
    with pytest.raises(ZeroDivisionError):
        broken(budget.reserve(99, should_stop=go_on))
    assert budget.stats().num_bytes == 0


def broken(reservation: Reservation) -> None:
    with reservation:
        raise ZeroDivisionError
