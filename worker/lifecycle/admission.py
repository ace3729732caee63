"""Lets jobs in, and shuts while the worker changes what it serves: then no job is claimed, and those inside finish."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Busy(Exception):
    """Raised when the jobs inside did not finish in time."""


class Admission:
    """The door of one worker. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._num_inside = 0

    @property
    def is_open(self) -> bool:
        """Whether jobs are let in."""
        return self._is_open

    def enter(self) -> bool:
        """Let a job in, if the door is open; then the caller calls `leave` when the job is over."""
        with self._changed:
            self._num_inside += self._is_open
            return self._is_open

    def leave(self) -> None:
        """Note that a job which was let in is over."""
        with self._changed:
            self._num_inside -= 1
            self._changed.notify_all()

    @contextmanager
    def shut(self, timeout_s: float) -> Iterator[None]:
        """A context in which no job is inside. Raises Busy when some did not finish within `timeout_s`."""
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            self._is_open = False
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._num_inside, give_up_at - time.monotonic()):
                    raise Busy(f"{self._num_inside} jobs did not finish within {timeout_s:.0f} s")
            yield
        finally:
            with self._changed:
                self._is_open = True
