"""One claimed job in this process: its reason to stop, its timings, and the registry of all attempts.

Stopping is cooperative: any thread calls `Attempt.stop` with a reason, and the code that works for the attempt calls
`check()` between two steps, which raises Stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType

from api_stub.contract.result import Timings
from api_stub.ledger.rows import Claim
from worker.engine.request import Finish
from worker.streaming.output import AttemptStream


class Lap:
    """A context manager that adds up the time spent inside it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.entered_at = 0.0

    def __enter__(self) -> None:
        self.entered_at = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.monotonic() - self.entered_at


class Stopwatch:
    """Times one attempt, from its claim on. At the claim the job had been queued for `queued_s` since its last attempt,
    and `age_s` since its submission.
    """

    def __init__(self, queued_s: float, age_s: float) -> None:
        self._queued_s, self._age_s = queued_s, age_s
        self._started_at = time.monotonic()
        self.fetch, self.prepare, self.generate = Lap(), Lap(), Lap()

    @property
    def total_s(self) -> float:
        """Seconds from submit until now."""
        return self._age_s + time.monotonic() - self._started_at

    def first_token_s(self, finish: Finish) -> float:
        """Return seconds from submit until the first token of an answer."""
        return self._age_s + self.generate.entered_at - self._started_at + finish.first_token_s

    def timings(self, finish: Finish) -> Timings:
        """Return the timings of an attempt that has just ended."""
        return Timings(
            queued_s=round(self._queued_s, 6),
            fetch_s=round(self.fetch.seconds, 6),
            prepare_s=round(self.prepare.seconds, 6),
            first_token_s=round(finish.first_token_s, 6),
            generate_s=round(self.generate.seconds, 6),
            total_s=round(self.total_s, 6),
        )


class StopReason(StrEnum):
    """Why an attempt must end before its answer is complete."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    LOST = "lost"
    UNCONFIRMED = "unconfirmed"
    DRAINED = "drained"


class Stopped(Exception):
    """Raised by `Attempt.check()` in the thread that works for the attempt."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Attempt:
    """A claim, with its deadline and the last confirmation of its lease (`held_at`) in monotonic time."""

    def __init__(self, claim: Claim, clock: Callable[[], float] = time.monotonic) -> None:
        self.claim = claim
        self.stream = AttemptStream(claim.job_id, claim.fence)
        self.started_at = clock()
        self.held_at = self.started_at
        left_s = claim.deadline_left_s
        self.deadline_at = None if left_s is None else self.started_at + left_s
        self._clock = clock
        self._lock = threading.Lock()
        self._reason: StopReason | None = None
        self._on_stop: Callable[[], None] | None = None

    @property
    def request_id(self) -> str:
        """The engine's id for this attempt; differs between two attempts of one job."""
        return f"{self.claim.job_id}:{self.claim.fence}"

    @property
    def unconfirmed_s(self) -> float:
        """Seconds since the ledger last confirmed this attempt's lease."""
        return self._clock() - self.held_at

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the attempt has to stop, if it has to."""
        if self._reason is None and self.deadline_at is not None and self._clock() >= self.deadline_at:
            self.stop(StopReason.DEADLINE)
        return self._reason

    def stop(self, reason: StopReason) -> None:
        """Ask the attempt to stop. The first reason is kept; only a lost lease overrides it. Any thread."""
        with self._lock:
            is_first = self._reason is None
            if is_first or reason is StopReason.LOST:
                self._reason = reason
            on_stop = self._on_stop if is_first else None
        if reason is StopReason.LOST:
            self.stream.is_lost = True
        if on_stop is not None:
            on_stop()

    def check(self) -> None:
        """Raise Stopped when the attempt has to stop."""
        reason = self.stop_reason
        if reason is not None:
            raise Stopped(reason)

    def when_stopped(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the attempt is stopped: from the stopping thread, or at once if it already is."""
        with self._lock:
            self._on_stop = callback
            is_stopped = self._reason is not None
        if is_stopped:
            callback()


class Attempts:
    """All attempts of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: dict[str, Attempt] = {}
        self._closed_for: StopReason | None = None

    def __len__(self) -> int:
        return len(self._attempts)

    @property
    def are_closed(self) -> bool:
        """Whether `close` was called: the process is ending."""
        return self._closed_for is not None

    def add(self, attempt: Attempt) -> None:
        """Register an attempt; the heartbeat renews its lease from now on. After `close` it is stopped at once."""
        with self._lock:
            self._attempts[attempt.request_id] = attempt
            reason = self._closed_for
        if reason is not None:
            attempt.stop(reason)

    def remove(self, attempt: Attempt) -> None:
        """Unregister an attempt; its lease is not renewed any more."""
        with self._lock:
            self._attempts.pop(attempt.request_id, None)

    def close(self, reason: StopReason) -> None:
        """Stop all attempts, and every one that is added from now on."""
        with self._lock:
            self._closed_for = reason
            attempts = tuple(self._attempts.values())
        for attempt in attempts:
            attempt.stop(reason)

    def held(self) -> tuple[Attempt, ...]:
        """Return the attempts at this moment."""
        with self._lock:
            return tuple(self._attempts.values())
