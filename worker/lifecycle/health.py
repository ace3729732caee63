"""What probes are told about a worker.

Live: it loads, or it consumes and its engine steps, or it drains. A live worker may be useless for a moment (Redis is
away, it is sick): restarting it would not help. Ready: warm, consuming, not draining, not sick, Redis takes writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum

from worker.lifecycle.watchdog import Finding


class Phase(StrEnum):
    """Where a worker is in its life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a serving worker says of itself.

    sick_of: what fails every job, empty when nothing does. redis_silent_s: since Redis last confirmed a heartbeat.
    redis_refusal: why it takes no writes, if it said so.
    """

    is_engine_alive: bool
    is_publisher_alive: bool
    is_consuming: bool
    is_draining: bool
    sick_of: str
    redis_silent_s: float
    redis_refusal: str | None
    num_held: int
    num_running: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class Report:
    """The answer to one probe; `problems` is empty when all is well."""

    phase: Phase
    problems: tuple[str, ...]
    vitals: Vitals | None

    @property
    def is_good(self) -> bool:
        """Whether the probe succeeds."""
        return not self.problems

    def to_dict(self) -> dict[str, object]:
        """Return the report as it goes into JSON."""
        said = {"status": "ok" if self.is_good else "failing", "phase": self.phase.value, "problems": self.problems}
        return said | ({} if self.vitals is None else asdict(self.vitals))


class Health:
    """The health of one worker, from the first moment of its process on. Any thread.

    redis_timeout_s: Redis counts as away when it has confirmed no heartbeat for this long.
    """

    def __init__(self, redis_timeout_s: float) -> None:
        self._redis_timeout_s = redis_timeout_s
        self._vitals: Callable[[], Vitals] | None = None
        self._finding: Finding | None = None
        self._lock = threading.Lock()

    def serve(self, vitals: Callable[[], Vitals]) -> None:
        """The model is warm; from now on `vitals` knows."""
        self._vitals = vitals

    def fail(self, finding: Finding) -> bool:
        """The worker is beyond help and will be restarted; return whether this is news."""
        with self._lock:
            is_news, self._finding = self._finding is None, self._finding or finding
        return is_news

    def liveness(self) -> Report:
        """Return whether the process should go on."""
        vitals = self._look()
        problems = [] if self._finding is None else [f"{self._finding.trouble.value}: {self._finding.facts}"]
        if vitals is not None and not problems:
            problems += self._dead_threads(vitals)
        return Report(_phase(vitals), tuple(problems), vitals)

    def readiness(self) -> Report:
        """Return whether jobs that are sent now are taken by this worker."""
        vitals = self._look()
        problems = list(self.liveness().problems)
        if vitals is None:
            problems.append("loading: the model is not warm yet")
        else:
            if vitals.is_draining:
                problems.append("draining: no more jobs are taken")
            elif not vitals.is_consuming:
                problems.append("not consuming: the queue is not being read")
            if vitals.sick_of:
                problems.append(f"sick of {vitals.sick_of}")
            if vitals.redis_refusal is not None:
                problems.append(vitals.redis_refusal)
            if vitals.redis_silent_s > self._redis_timeout_s:
                problems.append(f"redis: silent for {vitals.redis_silent_s:.1f} s")
        return Report(_phase(vitals), tuple(problems), vitals)

    def _look(self) -> Vitals | None:
        return self._vitals() if self._vitals is not None else None

    @staticmethod
    def _dead_threads(vitals: Vitals) -> list[str]:
        threads = (("engine", vitals.is_engine_alive), ("publisher", vitals.is_publisher_alive))
        return [f"{name}: the thread has ended" for name, is_alive in threads if not is_alive]


def _phase(vitals: Vitals | None) -> Phase:
    if vitals is None:
        return Phase.LOADING
    return Phase.DRAINING if vitals.is_draining else Phase.SERVING
