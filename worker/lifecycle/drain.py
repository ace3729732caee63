"""What a worker takes from its queue, and how it stops taking: on SIGTERM, or while it is sick.

`Consumption` says whether the worker is subscribed, when it last took something and how many threads are free; it is
written by the broker's event loop and the threads of jobs, read by the watchdog and the probes. On SIGTERM the worker
claims nothing more, lets running jobs finish for `drain_s` and gives the rest back, with no loss charged: Celery on a
thread pool would wait for running tasks without a limit. Knows no broker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from worker.jobs.attempt import Attempts, StopReason

#: An event loop that was silent this long does not consume, whatever it was told. It turns every second.
LOOP_SILENCE_S: Final = 15.0


class Consumption:
    """The consumption of one worker with `num_slots` threads for jobs. Any thread.

    `num_signs` grows whenever something comes off the queue or is begun.
    """

    def __init__(self, num_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_slots = num_slots
        self.num_signs = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._num_taken = 0
        self._is_subscribed = False
        self._turned_at = clock()

    @property
    def is_consuming(self) -> bool:
        """Whether the worker is subscribed to its queue and its event loop turns."""
        return self._is_subscribed and self._clock() - self._turned_at < LOOP_SILENCE_S

    @property
    def num_free(self) -> int:
        """Slots without a message."""
        return self.num_slots - self._num_taken

    def subscribed(self) -> None:
        """The queue is being read."""
        self.turned()
        self._is_subscribed = True

    def unsubscribed(self) -> None:
        """The connection is gone, or the worker stops."""
        self._is_subscribed = False

    def turned(self) -> None:
        """The event loop has come around."""
        self._turned_at = self._clock()

    def met(self) -> None:
        """Something came off the queue, be it no message at all."""
        with self._lock:
            self.num_signs += 1

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A message occupies a slot."""
        with self._lock:
            self.num_signs += 1
            self._num_taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_taken -= 1


logger = logging.getLogger(__name__)


class Drain:
    """The drain of one worker process. `begin()` may be called from a signal handler, more than once."""

    def __init__(self, attempts: Attempts, drain_s: float) -> None:
        self._attempts = attempts
        self._drain_s = drain_s
        self._begun = threading.Event()
        self._given_back = threading.Event()

    @property
    def is_draining(self) -> bool:
        """True from the first `begin()` on: no new job may be claimed."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Stop claiming and start the clock."""
        if self._begun.is_set():
            return
        self._begun.set()
        # Nothing more in a signal handler: what is interrupted may hold a lock that a log line needs.
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def _run(self) -> None:
        logger.info("draining", extra={"action": "drain", "num_running": len(self._attempts), "drain_s": self._drain_s})
        self._given_back.wait(self._drain_s)
        self.give_back()

    def give_back(self) -> None:
        """Wait no longer: what still runs goes back to the queue. Any thread, more than once."""
        self._attempts.close(StopReason.DRAINED)
        self._given_back.set()
