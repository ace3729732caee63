"""The consumption of a worker's queue, and its end on SIGTERM: the drain.

`Consumption` holds whether the worker is subscribed, whether it receives messages and how many threads are free; the
broker's event loop and the jobs' threads write it, the watchdog and the probes read it. `Drain` lets running jobs
finish for `drain_s` and gives the rest back to the queue, at no cost for them: Celery on a thread pool would wait for
running tasks without a limit. Knows no broker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from worker.jobs.attempt import Attempts, StopReason

logger = logging.getLogger(__name__)

#: An event loop that has not run its timer for this long counts as not consuming; the timer is due every second.
LOOP_SILENCE_S: Final = 15.0


class Consumption:
    """The consumption of one worker with `num_threads` threads for jobs. Any thread.

    `num_signs` grows with every entry that is received and every message that a thread begins to handle.
    """

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_threads = num_threads
        self.num_signs = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._num_occupied = 0
        self._is_subscribed = False
        self._turned_at = clock()

    @property
    def is_consuming(self) -> bool:
        """Whether the worker is subscribed to its queue and its event loop runs."""
        return self._is_subscribed and self._clock() - self._turned_at < LOOP_SILENCE_S

    @property
    def num_free(self) -> int:
        """Threads without a message."""
        return self.num_threads - self._num_occupied

    def subscribed(self) -> None:
        """Note that the worker is subscribed to its queue."""
        self.turned()
        self._is_subscribed = True

    def unsubscribed(self) -> None:
        """Note that the connection is closed, or that the worker stops."""
        self._is_subscribed = False

    def turned(self) -> None:
        """Note that the event loop runs. Called by its timer."""
        self._turned_at = self._clock()

    def received(self) -> None:
        """Note that an entry came off the queue, also one that is dropped."""
        with self._lock:
            self.num_signs += 1

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """A context in which a message occupies a thread."""
        with self._lock:
            self.num_signs += 1
            self._num_occupied += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_occupied -= 1


class Drain:
    """The drain of one worker process: no more claims, and `drain_s` for running jobs to finish."""

    def __init__(self, attempts: Attempts, drain_s: float) -> None:
        self._attempts = attempts
        self._drain_s = drain_s
        self._begun = threading.Event()
        self._given_back = threading.Event()

    @property
    def is_draining(self) -> bool:
        """Whether `begin` was called: no new job may be claimed."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Start the drain. May be called from a signal handler, and more than once."""
        if self._begun.is_set():
            return
        self._begun.set()
        # No logging in a signal handler: the interrupted code may hold the log's lock.
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def _run(self) -> None:
        logger.info("draining", extra={"action": "drain", "num_running": len(self._attempts), "drain_s": self._drain_s})
        self._given_back.wait(self._drain_s)
        self.give_back()

    def give_back(self) -> None:
        """End the drain now: jobs that still run go back to the queue. Any thread, more than once."""
        self._attempts.close(StopReason.DRAINED)
        self._given_back.set()
