"""Silence is what was watched: stalls and muteness by an injected clock, threads by real ones."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import redis

from api_stub.contract import names
from worker.jobs.attempt import Attempts
from worker.lifecycle.consumption import LOOP_SILENCE_S, Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.job_process import num_consumable
from worker.lifecycle.watchdog import (
    EngineWatch,
    Finding,
    PublisherWatch,
    QueueWatch,
    ThreadWatch,
    Trouble,
    Watch,
    Watchdog,
    stacks,
)


@dataclass
class FakeEngine:
    """An engine that stands where it is put."""

    is_alive: bool = True
    last_step_at: float = 0.0
    num_running: int = 1
    num_waiting: int = 0


@dataclass
class FakePublisher:
    """A publisher that turns when it is told to."""

    is_busy: bool = True
    num_turns: int = 0


class Queue:
    """A queue that a test fills, breaks and empties."""

    def __init__(self, length: int) -> None:
        self.length: int | None = length

    def __call__(self) -> int:
        if self.length is None:
            raise redis.ConnectionError("away")
        return self.length


def looked(watch: Watch, start: int, stop: int) -> Finding | None:
    """Look once a second; return the last finding."""
    return [watch.look(float(now)) for now in range(start, stop)][-1]


def test_an_engine_with_work_and_no_step_is_found_after_its_time_and_not_before() -> None:
    watch = EngineWatch(FakeEngine(), stall_s=10)
    assert looked(watch, 0, 10) is None
    found = watch.look(10.0)
    assert found is not None
    assert found.trouble is Trouble.STALLED
    assert "no step for 10 s with 1 running and 0 waiting" in found.facts


def test_a_step_and_an_end_of_work_start_the_time_anew() -> None:
    engine = FakeEngine()
    watch = EngineWatch(engine, stall_s=10)
    assert looked(watch, 0, 9) is None
    engine.last_step_at = 9.0
    assert looked(watch, 9, 18) is None
    engine.num_running = 0
    assert looked(watch, 18, 60) is None


def test_time_in_which_nobody_looked_was_not_silent() -> None:
    watch = EngineWatch(FakeEngine(), stall_s=10)
    assert looked(watch, 0, 3) is None
    assert watch.look(1000.0) is None, "the process was stopped meanwhile"
    assert looked(watch, 1001, 1003) is None


def test_a_dead_engine_is_found_at_once() -> None:
    found = EngineWatch(FakeEngine(is_alive=False), stall_s=10).look(0.0)
    assert found is not None
    assert found.trouble is Trouble.ENGINE_DEAD


def test_a_worker_that_takes_nothing_from_a_full_queue_is_mute() -> None:
    watch = QueueWatch(Consumption(2), Queue(3), mute_s=10)
    assert looked(watch, 0, 10) is None
    found = watch.look(10.0)
    assert found is not None
    assert found.trouble is Trouble.MUTE
    assert "3 messages in the queue, 2 free threads" in found.facts


@pytest.mark.parametrize("length", [0, None], ids=["empty queue", "no Redis"])
def test_with_nothing_to_take_nobody_is_mute(length: int | None) -> None:
    queue = Queue(3)
    watch = QueueWatch(Consumption(2), queue, mute_s=10)
    assert looked(watch, 0, 9) is None
    queue.length = length
    assert looked(watch, 9, 60) is None
    queue.length = 3
    assert looked(watch, 60, 69) is None, "the time before counts no more"


def test_what_redis_hands_nobody_and_what_a_drain_leaves_is_not_to_be_taken(redis_client: redis.Redis) -> None:
    drain = Drain(Attempts(), drain_s=0)
    redis_client.lpush(names.queue_list("default", 6), "{}")
    assert num_consumable(redis_client, "default", drain) == 1
    redis_client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(redis.ResponseError):
            num_consumable(redis_client, "default", drain)
    finally:
        redis_client.config_set("min-replicas-to-write", 0)
    drain.begin()
    assert num_consumable(redis_client, "default", drain) == 0


def test_a_message_or_a_lack_of_slots_is_no_muteness() -> None:
    consumption = Consumption(1)
    watch = QueueWatch(consumption, Queue(3), mute_s=10)
    assert looked(watch, 0, 9) is None
    with consumption.occupied():
        assert looked(watch, 9, 60) is None
    assert looked(watch, 60, 69) is None
    with consumption.occupied():
        pass
    assert looked(watch, 69, 78) is None


def test_a_publisher_that_does_nothing_about_its_events_is_found() -> None:
    watch = PublisherWatch(FakePublisher(), lambda: True, stall_s=10)
    assert looked(watch, 0, 10) is None
    found = watch.look(10.0)
    assert found is not None
    assert found.trouble is Trouble.PUBLISHER_STALLED


def test_a_publisher_that_tries_again_or_has_nothing_or_nobody_to_tell_is_left_alone() -> None:
    publisher, is_redis_there = FakePublisher(), [True]
    watch = PublisherWatch(publisher, lambda: is_redis_there[0], stall_s=10)
    for now in range(60):
        publisher.num_turns += now % 9 == 0
        assert watch.look(float(now)) is None
    publisher.is_busy = False
    assert looked(watch, 60, 90) is None
    publisher.is_busy, is_redis_there[0] = True, False
    assert looked(watch, 90, 120) is None
    is_redis_there[0] = True
    assert looked(watch, 120, 129) is None, "the time before counts no more"


def test_consuming_means_subscribed_and_turning() -> None:
    now = [0.0]
    consumption = Consumption(1, lambda: now[0])
    assert not consumption.is_consuming
    consumption.subscribed()
    assert consumption.is_consuming
    now[0] += LOOP_SILENCE_S
    assert not consumption.is_consuming, "the loop hangs"
    consumption.turned()
    assert consumption.is_consuming
    consumption.unsubscribed()
    assert not consumption.is_consuming


def test_the_first_finding_is_told_once_with_all_stacks_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Finding] = []
    watch = ThreadWatch(Trouble.PUBLISHER_DEAD, lambda: False)
    dog = Watchdog([watch], told.append, interval_s=0.01, frozen_s=60)
    dog.start()
    dog._thread.join(20)
    assert [finding.trouble for finding in told] == [Trouble.PUBLISHER_DEAD]
    (record,) = [record for record in caplog.records if record.message == "worker is stuck"]
    assert any(name.startswith("MainThread") for name in record.stacks)  # type: ignore[attr-defined]
    dog.stop(1)


FOUND = """
import threading, time
from worker.lifecycle.watchdog import ThreadWatch, Trouble, Watchdog
told = threading.Event()
dog = Watchdog([ThreadWatch(Trouble.PUBLISHER_DEAD, lambda: False)], lambda _: told.set(), interval_s=0.05, frozen_s=1)
dog.start()
print(told.wait(20))
time.sleep(2)
"""


def test_after_a_finding_the_end_is_left_to_who_was_told() -> None:
    done = subprocess.run([sys.executable, "-c", FOUND], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


KNOWN_FAULT = """
import signal, threading, time
import worker.lifecycle.job_process
import worker.lifecycle.process
from worker.jobs.attempt import Attempts
from worker.lifecycle.drain import Drain
from worker.lifecycle.health import Health
from worker.lifecycle.watchdog import Finding, ThreadWatch, Trouble, Watchdog
worker.lifecycle.job_process.LAST_RESORT_S = 1
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a shutdown that hangs
process = worker.lifecycle.process.WorkerProcess.__new__(worker.lifecycle.process.WorkerProcess)
process.health, process.drain, process.exit_status = Health(redis_timeout_s=5), Drain(Attempts(), drain_s=60), 0
process.fail(Finding(Trouble.ENGINE_DEAD, "a job has met it"))
looked = threading.Event()
Watchdog([ThreadWatch(Trouble.ENGINE_DEAD, lambda: looked.set())], process.fail, interval_s=0.1, frozen_s=60).start()
looked.wait(20)
time.sleep(20)
"""


def test_a_known_fault_that_the_watchdog_reports_later_leaves_the_last_resort_in_place() -> None:
    done = subprocess.run([sys.executable, "-c", KNOWN_FAULT], capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr


def test_a_watch_that_breaks_does_not_end_the_watchdog() -> None:
    looks: list[float] = []

    class Broken:
        def look(self, now: float) -> Finding | None:
            looks.append(now)
            if len(looks) < 3:
                raise RuntimeError("odd")
            return Finding(Trouble.STALLED, "at last")

    told = threading.Event()
    dog = Watchdog([Broken()], lambda _: told.set(), interval_s=0.01, frozen_s=60)
    dog.start()
    assert told.wait(20)
    dog.stop(1)


def test_stacks_name_threads_and_places_and_hold_no_values() -> None:
    secret = "hunter2"
    found = stacks()
    main = next(frames for name, frames in found.items() if name.startswith("MainThread"))
    assert "test_watchdog.py" in main[-2]
    assert secret not in str(found)


FROZEN = """
import ctypes, threading
from worker.lifecycle.watchdog import Watchdog
dog = Watchdog([], print, interval_s=0.05, frozen_s=1)
dog.start()
threading.Event().wait(0.5)
ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock
"""


def test_a_process_that_cannot_run_python_any_more_is_ended_with_its_stacks() -> None:
    done = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in <module>" in done.stderr
    assert done.returncode != -signal.SIGKILL
