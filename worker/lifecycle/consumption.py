"""The consumption of a worker's queue: whether it is subscribed, whether it receives, and how many threads are free.

Written by the broker's event loop and by the jobs' threads, read by the watchdog and the probes. Knows no broker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

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
