"""How far a reader is: which events it forwards, which text it yields, how long it waits. No I/O.

`follow` drives these for threads and for asyncio alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from api_stub.contract.error import ErrorInfo
from api_stub.contract.event import Event, FinalEvent, JobCompleted, OutputDelta
from api_stub.contract.result import Result
from api_stub.errors import JobFailed, StoreUnavailable, StreamRestarted, VisionqError
from api_stub.ledger.backoff import Backoff

#: A channel that was silent this long is subscribed anew: a half-open connection looks the same as a quiet one.
RESUBSCRIBE_S: Final = 7.5
#: How long a dead Redis is retried: before the first answer, and once it had answered.
FIRST_CONNECT_S: Final = 2.5
RECONNECT_S: Final = 60.0
RECONNECTS: Final = Backoff(first_s=0.05, max_s=1.0)


class EventCursor:
    """A reader's place in one job's events: duplicates and events of older attempts are dropped.

    `is_finished` once the final event was met, also when the reader began behind it.
    """

    def __init__(self, after: int = 0) -> None:
        self._after = after
        self._attempt = 0
        self.last_seq = after
        self.is_finished = False

    def is_gap(self, event: Event) -> bool:
        """True when events before this one have not been seen yet."""
        return event.seq > self.last_seq + 1

    def take(self, event: Event) -> tuple[Event, ...]:
        """Move on to `event`; return it if the reader shall see it."""
        if isinstance(event, FinalEvent):
            # Not dropped as a duplicate: a Redis that lost its last second counts from an earlier seq again.
            self.is_finished = True
            return (event,) if event.seq > self._after else ()
        if event.seq <= self.last_seq:
            return ()
        self.last_seq = event.seq
        is_outdated = event.attempt < self._attempt
        self._attempt = max(self._attempt, event.attempt)
        return () if is_outdated else (event,)


@dataclass(slots=True)
class TextCursor:
    """The text that was yielded so far. A delta's `offset` says where it belongs, so an attempt that
    repeats the text of the one before it yields only what is new."""

    text: str = ""

    def take(self, event: Event) -> str:
        """Return the new text that `event` brings. Raises StreamRestarted, JobFailed."""
        if isinstance(event, OutputDelta):
            return self._extend(event.text, event.offset)
        if isinstance(event, JobCompleted):
            return self._complete(event.result.text)
        if isinstance(event, FinalEvent):
            answered(None, event.error)
        return ""

    def _extend(self, piece: str, offset: int) -> str:
        if offset > len(self.text):
            return ""  # deltas were lost with Redis' memory; the final event brings the text
        known = self.text[offset : offset + len(piece)]
        if not piece.startswith(known):
            raise StreamRestarted(f"a new attempt differs at character {offset}")
        new = piece[len(known) :]
        self.text += new
        return new

    def _complete(self, text: str) -> str:
        if not text.startswith(self.text):
            raise StreamRestarted("the result differs from the text that was streamed")
        rest = text[len(self.text) :]
        self.text = text
        return rest


def answered(result: Result | None, error: ErrorInfo | None) -> Result:
    """Return the result that a job ended with. Raises JobFailed."""
    if result is not None:
        return result
    assert error is not None  # a final job has one of the two
    raise JobFailed(error.code.value, error.message, error.retryable, error.details or ())


class ReadTimeouts:
    """How long one read waits: for events (`timeout` seconds of silence, None: for ever) and for whom it asks."""

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._silent_since = clock()
        self._num_failures = 0
        self._failing_since: float | None = self._silent_since
        self._has_connected = False

    def heard(self) -> None:
        """Something came, and the caller has dealt with it: silence begins now."""
        self._silent_since = self._clock()

    def connected(self) -> None:
        """It answered."""
        self._has_connected = True
        self._failing_since = None
        self._num_failures = 0

    def wait_s(self, at_most: float | None = None) -> float:
        """Return how long to wait for a message, at most RESUBSCRIBE_S unless given. Raises TimeoutError when the
        silence was too long."""
        left = self._left_s()
        if left <= 0:
            raise TimeoutError(f"nothing came within {self._timeout} s")
        return min(left, RESUBSCRIBE_S if at_most is None else at_most)

    def pause_s(self, error: Exception) -> float:
        """Return how long to wait before it is tried again. Raises StoreUnavailable, or `error` itself if it
        is one of ours, when that was long enough."""
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        limit = RECONNECT_S if self._has_connected else FIRST_CONNECT_S
        self._num_failures += 1
        pause = RECONNECTS.delay_s(self._num_failures)
        if now + pause - self._failing_since >= limit or pause >= self._left_s():
            if isinstance(error, VisionqError):
                raise error
            raise StoreUnavailable(f"Redis did not answer: {type(error).__name__}") from error
        return pause

    def _left_s(self) -> float:
        if self._timeout is None:
            return math.inf
        return self._silent_since + self._timeout - self._clock()
