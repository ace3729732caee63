"""Seconds that the stages of one attempt took."""

from __future__ import annotations

import time
from types import TracebackType

from api_stub.contract.result import Timings
from worker.engine.request import Finish


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
    """Started at the claim: by then the job had waited `queued_s` for this attempt, and was `age_s` old."""

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
