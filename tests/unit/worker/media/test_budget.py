"""Room for decoded media: never more than there is, in order of arrival, given back whatever happens."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.servers import eventually
from worker.errors import DeadlineExceeded
from worker.media.budget import Held, Room


def go_on() -> None:
    """Nobody gives up."""


def test_many_jobs_never_hold_more_than_there_is() -> None:
    room, lock = Room(1000), threading.Lock()
    held_now, most, done = 0, 0, 0

    def job(num_bytes: int) -> None:
        nonlocal held_now, most, done
        with room.take(num_bytes, should_stop=go_on) as held:
            with lock:
                held_now += num_bytes
                most = max(most, held_now)
            time.sleep(0.001)
            with lock:
                held_now -= num_bytes // 2
            held.shrink(num_bytes - num_bytes // 2)
            with lock:
                held_now -= num_bytes - num_bytes // 2
                done += 1

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(job, [100, 400, 1000, 7, 300] * 40))
    assert done == 200
    assert 300 < most <= 1000
    assert room.stats().num_bytes == room.stats().num_waiting == 0


def test_a_large_job_is_not_overtaken() -> None:
    room = Room(10)
    order: list[str] = []

    def job(name: str, num_bytes: int) -> None:
        with room.take(num_bytes, should_stop=go_on):
            order.append(name)

    with ThreadPoolExecutor(2) as threads:
        with room.take(6, should_stop=go_on):
            threads.submit(job, "large", 10)
            eventually(lambda: room.stats().num_waiting == 1, what="the large job waits")
            threads.submit(job, "small", 1)
            eventually(lambda: room.stats().num_waiting == 2, what="the small job waits behind it")
            job("text", 0)
            assert order == ["text"]
        eventually(lambda: order == ["text", "large", "small"], what="both went")
    assert room.stats().num_waited == 2


def test_a_job_that_gives_up_lets_the_next_one_go() -> None:
    room, is_late = Room(10), threading.Event()

    def give_up() -> None:
        if is_late.is_set():
            raise DeadlineExceeded("too late")

    with room.take(1, should_stop=go_on), ThreadPoolExecutor(2) as threads:
        large = threads.submit(room.take, 10, should_stop=give_up)
        eventually(lambda: room.stats().num_waiting == 1, what="the large job waits")
        small = threads.submit(room.take, 1, should_stop=go_on)
        is_late.set()
        with pytest.raises(DeadlineExceeded):
            large.result(10)
        with small.result(10):
            assert room.stats().num_bytes == 2
    assert room.stats().num_bytes == 0


def test_a_job_that_breaks_gives_its_room_back() -> None:
    room = Room(10)
    with pytest.raises(ZeroDivisionError):
        broken(room.take(99, should_stop=go_on))
    assert room.stats().num_bytes == 0


def broken(held: Held) -> None:
    with held:
        raise ZeroDivisionError
