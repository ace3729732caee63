"""Room for the decoded pictures of all jobs at once: a job waits for it before it reads its media, in order of arrival.

A job asks once, for the most that it may need, and gives back what it turned out not to need: jobs that hold some and
wait for more could wait for each other for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

#: How often a job that waits looks at its own cancel and deadline.
POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class RoomStats:
    """Bytes that jobs hold or may need now, jobs that wait, and how many had to since boot."""

    num_bytes: int
    num_waiting: int
    num_waited: int


class Held:
    """A job's share of the room, until the block is left. For one thread."""

    def __init__(self, room: Room, num_bytes: int) -> None:
        self._room, self._num_bytes = room, num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Give back all but `num_bytes`."""
        self._room._give_back(max(0, self._num_bytes - num_bytes))
        self._num_bytes = min(self._num_bytes, num_bytes)

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shrink(0)


class Room:
    """Shared by all jobs of a worker; every method may be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._free = max_bytes
        self._waiting: deque[object] = deque()
        self._num_waited = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int, *, should_stop: Callable[[], None]) -> Held:
        """Wait for `num_bytes`, at most all of the room; enter what this returns at once.

        Whoever came first goes first, so that large jobs do not wait for ever behind small ones. `should_stop` raises
        to give the job up.
        """
        num_bytes = min(num_bytes, self.max_bytes)
        if num_bytes == 0:
            return Held(self, 0)
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            self._num_waited += not self._may_go(turn, num_bytes)
        try:
            while not self._taken(turn, num_bytes):
                should_stop()
        finally:
            with self._changed:
                self._waiting.remove(turn)
                self._changed.notify_all()
        return Held(self, num_bytes)

    def stats(self) -> RoomStats:
        """Return the counts at this moment."""
        with self._changed:
            return RoomStats(self.max_bytes - self._free, len(self._waiting), self._num_waited)

    def _taken(self, turn: object, num_bytes: int) -> bool:
        with self._changed:
            may_go = self._changed.wait_for(lambda: self._may_go(turn, num_bytes), POLL_S)
            self._free -= num_bytes if may_go else 0
            return may_go

    def _may_go(self, turn: object, num_bytes: int) -> bool:
        return self._waiting[0] is turn and num_bytes <= self._free

    def _give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._free += num_bytes
            self._changed.notify_all()
