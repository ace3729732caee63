"""Liveness and readiness of a worker, as its probes report them.

Live: it is loading, or consuming while its engine makes steps, or draining. A live worker may be unable to serve for a
while (Redis is away, its circuit breaker is open); restarting it would not help. Ready: the model is warm, the queue is
consumed, the circuit breaker is closed and Redis accepts writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum

from worker.lifecycle.watchdog import Finding


class Phase(StrEnum):
    """The phases of a worker process, in order."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Vitals:
    """The state of a serving worker.

    sick_of: why its circuit breaker is open; empty when it is closed.
    redis_silent_s: seconds since Redis last confirmed a heartbeat.
    redis_refusal: why Redis refuses writes, if it does.
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
    """The answer to one probe, which succeeds when `problems` is empty."""

    phase: Phase
    problems: tuple[str, ...]
    vitals: Vitals | None

    @property
    def is_good(self) -> bool:
        """Whether the probe succeeds."""
        return not self.problems

    def to_dict(self) -> dict[str, object]:
        """Return the report as it goes into JSON."""
        report = {"status": "ok" if self.is_good else "failing", "phase": self.phase.value, "problems": self.problems}
        return report | ({} if self.vitals is None else asdict(self.vitals))


class Health:
    """The health of one worker, from the start of its process on. Any thread.

    redis_timeout_s: Redis counts as away when it has confirmed no heartbeat for this long.
    """

    def __init__(self, redis_timeout_s: float) -> None:
        self._redis_timeout_s = redis_timeout_s
        self._vitals: Callable[[], Vitals] | None = None
        self._finding: Finding | None = None
        self._lock = threading.Lock()

    def serve(self, vitals: Callable[[], Vitals]) -> None:
        """Note that the model is warm, and read the worker's state from `vitals` from now on."""
        self._vitals = vitals

    def fail(self, finding: Finding) -> bool:
        """Note a fatal fault, for which the worker will be restarted; return whether it is the first one."""
        with self._lock:
            is_first, self._finding = self._finding is None, self._finding or finding
        return is_first

    def liveness(self) -> Report:
        """Return the answer to /healthz: whether the process should keep running."""
        vitals = self._look()
        problems = [] if self._finding is None else [f"{self._finding.trouble.value}: {self._finding.facts}"]
        if vitals is not None and not problems:
            problems += self._dead_threads(vitals)
        return Report(_phase(vitals), tuple(problems), vitals)

    def readiness(self) -> Report:
        """Return the answer to /readyz: whether the worker claims and answers jobs that are submitted now."""
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
