"""The memory that the decoded media of all jobs may use together; a job reserves its share before it reads anything.

A job reserves once, for the most that it may need, and releases what it turned out not to need: jobs that hold a part
and wait for another could wait for each other for ever. Reservations are granted in order of arrival.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

#: How often a waiting job checks whether it was cancelled or its deadline has passed.
POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """Bytes reserved now, jobs waiting now, and the number of jobs that had to wait since boot."""

    num_bytes: int
    num_waiting: int
    num_waited: int


class MemoryBudget:
    """A budget of `max_bytes`, shared by all jobs of a worker. Every method may be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._free_bytes = max_bytes
        self._waiting: deque[object] = deque()
        self._num_waited = 0
        self._changed = threading.Condition()

    def reserve(self, num_bytes: int, *, should_stop: Callable[[], None]) -> Reservation:
        """Wait until `num_bytes`, capped at the whole budget, are free, and reserve them; use the result in `with`.

        First come, first served, so that large jobs do not wait for ever behind small ones. `should_stop` is called
        every `POLL_S` while the job waits, and raises to abort the wait.
        """
        num_bytes = min(num_bytes, self.max_bytes)
        if num_bytes == 0:
            return Reservation(self, 0)
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._num_waited += not self._can_reserve(ticket, num_bytes)
        try:
            while not self._try_reserve(ticket, num_bytes):
                should_stop()
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        return Reservation(self, num_bytes)

    def stats(self) -> BudgetStats:
        """Return the counts at this moment."""
        with self._changed:
            return BudgetStats(self.max_bytes - self._free_bytes, len(self._waiting), self._num_waited)

    def _try_reserve(self, ticket: object, num_bytes: int) -> bool:
        with self._changed:
            can_reserve = self._changed.wait_for(lambda: self._can_reserve(ticket, num_bytes), POLL_S)
            self._free_bytes -= num_bytes if can_reserve else 0
            return can_reserve

    def _can_reserve(self, ticket: object, num_bytes: int) -> bool:
        return self._waiting[0] is ticket and num_bytes <= self._free_bytes

    def _release(self, num_bytes: int) -> None:
        with self._changed:
            self._free_bytes += num_bytes
            self._changed.notify_all()


class Reservation:
    """One job's share of a budget; leaving the `with` block releases it. For one thread."""

    def __init__(self, budget: MemoryBudget, num_bytes: int) -> None:
        self._budget, self._num_bytes = budget, num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Release all but `num_bytes`."""
        self._budget._release(max(0, self._num_bytes - num_bytes))
        self._num_bytes = min(self._num_bytes, num_bytes)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shrink(0)
