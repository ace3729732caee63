"""The figures of one run and the table that tells them."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from tests.chaos.audit import Handover, Outcome
from tests.chaos.fleet import Life
from tests.chaos.injector import Injected
from tests.chaos.outage import Outage
from tests.chaos.plant import LEASE_S
from tests.chaos.takeover import Takeover

#: Recovery is measured where so many workers were left.
MIN_OTHERS: Final = 2
#: What the median recovery may take beyond the lease, and what 95 of 100 cancels of running jobs may take.
MAX_RECOVERY_S: Final = LEASE_S + 1.5
MAX_CANCEL_S: Final = 1.0
#: How soon a producer must know that Redis is away.
MAX_SUBMIT_S: Final = 5.0


@dataclass(slots=True)
class Report:
    """What happened. `problems` are broken promises, `misses` figures beyond their limits."""

    command: str
    injected: list[Injected] = field(default_factory=list)
    num_skipped: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    handovers: list[Handover] = field(default_factory=list)
    calm_cancels_s: list[float] = field(default_factory=list)
    outage: Outage | None = None
    takeover: Takeover | None = None
    junk_ids: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @property
    def recoveries_s(self) -> list[float]:
        """Seconds from each SIGKILL to the next start of each job that the worker held, while others served."""
        killed = {
            life.pid: life.asked_at
            for life in self.lives
            if life.asked is signal.SIGKILL and life.num_others >= MIN_OTHERS
        }
        return [
            handover.restarted_at - killed_at
            for handover in self.handovers
            if (killed_at := killed.get(_pid(handover.worker))) is not None and handover.retrying_at > killed_at
        ]

    @property
    def drains_s(self) -> list[float]:
        """Seconds from each SIGTERM to the end of the process."""
        asked = [life for life in self.lives if life.asked is signal.SIGTERM]
        return [life.ended_at - life.asked_at for life in asked if life.ended_at and life.asked_at]

    @property
    def cancels_s(self) -> list[float]:
        """Seconds from each cancel of a running job to its end, whatever was broken at the time."""
        return [
            outcome.final_at - outcome.ticket.cancel_at
            for outcome in self.outcomes
            if outcome.ticket.cancel_at and outcome.ticket.cancel_answer == "cancelling" and outcome.code == "cancelled"
        ]

    @property
    def misses(self) -> list[str]:
        """Figures beyond their limits."""
        found = []
        if self.recoveries_s and median(self.recoveries_s) > MAX_RECOVERY_S:
            found.append(f"median recovery {median(self.recoveries_s):.1f} s, the limit is {MAX_RECOVERY_S} s")
        if self.calm_cancels_s and _percentile(self.calm_cancels_s, 95) > MAX_CANCEL_S:
            found.append(f"cancel p95 {_percentile(self.calm_cancels_s, 95):.2f} s, the limit is {MAX_CANCEL_S} s")
        slowest = max((outcome.ticket.slowest_submit_s for outcome in self.outcomes), default=0.0)
        if slowest > MAX_SUBMIT_S:
            found.append(f"slowest submit call {slowest:.1f} s, the limit is {MAX_SUBMIT_S} s")
        return found + (self.outage.misses if self.outage else []) + (self.takeover.misses if self.takeover else [])

    def lines(self) -> str:
        """Return the table."""
        outcomes = self.outcomes
        statuses = Counter(f"{o.status} ({o.code})" if o.code else o.status for o in outcomes)
        kinds = Counter(injected.fault.kind.value for injected in self.injected)
        ends = Counter(_end(life) for life in self.lives)
        return "\n".join(
            [
                f"command      {self.command}",
                _row("faults", len(self.injected), kinds),
                *([f"             skipped, too few workers served: {self.num_skipped}"] if self.num_skipped else []),
                _row("jobs", len(outcomes), statuses),
                _row("plans", len(outcomes), Counter(outcome.ticket.plan.value for outcome in outcomes)),
                _row("attempts", sum(o.attempt for o in outcomes), Counter(o.attempt for o in outcomes)),
                _row("handovers", len(self.handovers), Counter(handover.reason for handover in self.handovers)),
                _row("workers", len(self.lives), ends),
                f"readers      {sum(o.ticket.num_visits for o in outcomes)} visits",
                f"submits      {sum(o.ticket.num_submits for o in outcomes)} calls, "
                f"slowest {max((o.ticket.slowest_submit_s for o in outcomes), default=0.0):.2f} s",
                _spread("recovery", self.recoveries_s, f"SIGKILL to the next start; lease {LEASE_S:.0f} s"),
                _spread("given back", self._given_back_s, "drained, to the next start"),
                _spread("drain", self.drains_s, "SIGTERM to the end"),
                _spread("cancel", self.cancels_s, "running, under faults"),
                _spread("cancel", self.calm_cancels_s, "running, all calm"),
                *([f"outage       {self.outage.line()}"] if self.outage else []),
                *([f"failover     {self.takeover.line()}"] if self.takeover else []),
                *(f"MISSED       {miss}" for miss in self.misses),
                *(f"VIOLATION    {problem}" for problem in self.problems[:40]),
                f"verdict      {len(self.problems)} violations, {len(self.misses)} figures beyond their limits",
            ]
        )

    @property
    def _given_back_s(self) -> list[float]:
        return [h.restarted_at - h.retrying_at for h in self.handovers if h.reason == "given_back"]


def life_problems(lives: Iterable[Life]) -> list[str]:
    """Return the ends of workers that nobody asked for, and drains that were not clean."""
    problems = []
    for life in lives:
        if life.ended_at is None or life.asked is signal.SIGKILL:
            continue
        refused_to_start = life.status == 78 and life.ready_at is None
        if life.asked is signal.SIGTERM and life.status != 0:
            problems.append(f"worker {life.pid} ended with {life.status} after SIGTERM: {life.worker.log}")
        elif life.asked is None and not refused_to_start:
            problems.append(f"worker {life.pid} ended by itself with {life.status}: {life.worker.log}")
    return problems


def _end(life: Life) -> str:
    if life.ended_at is None:
        return "alive"
    asked = life.asked.name if life.asked is not None else "unasked"
    return f"{asked}: {life.status}"


def _pid(worker: str) -> int:
    return int(worker.rpartition("-")[2] or 0)


def _row(title: str, total: int, parts: Counter[str] | Counter[int]) -> str:
    return f"{title:<12} {total}: " + ", ".join(f"{name} {count}" for name, count in sorted(parts.items()))


def _spread(title: str, seconds: Sequence[float], what: str) -> str:
    if not seconds:
        return f"{title:<12} none ({what})"
    return (
        f"{title:<12} min {min(seconds):.2f} s, median {median(seconds):.2f} s, p95 {_percentile(seconds, 95):.2f} s, "
        f"max {max(seconds):.2f} s of {len(seconds)} ({what})"
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
