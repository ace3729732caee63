"""What a worker takes from its queue: whether it is subscribed, when it last took something, how many slots are free.

Written by the broker's event loop and by the threads of jobs, read by the watchdog and by probes. Knows no broker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

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
