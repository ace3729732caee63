"""How far a phase of training is, and its report as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Report = Callable[[dict[str, object]], None]
REPORT_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Budget:
    """A phase ends after `minutes` of wall clock, or after `max_steps` when given (tests: no clock decides)."""

    minutes: float
    max_steps: int | None = None


@dataclass(slots=True)
class Progress:
    """Counts the steps of one phase, averages what they report, and prints the averages now and then."""

    phase: str
    budget: Budget
    report: Report
    step: int = 0
    _started: float = field(default_factory=time.monotonic)
    _reported: float = field(default_factory=time.monotonic)
    _sums: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Done share of the phase; 1 and more means it is over."""
        if self.budget.max_steps is not None:
            return self.step / self.budget.max_steps if self.budget.max_steps else 1.0
        return (time.monotonic() - self._started) / 60 / self.budget.minutes if self.budget.minutes > 0 else 1.0

    def add(self, **values: float) -> None:
        """Note one step's numbers."""
        self.step += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if time.monotonic() - self._reported > REPORT_EVERY_S or self.fraction >= 1:
            self._reported = time.monotonic()
            self.say(**{name: round(total / self._counts[name], 4) for name, total in self._sums.items()})
            self._sums, self._counts = {}, {}

    def say(self, **values: object) -> None:
        """Report these values with phase, step, and minutes of wall clock and of this process's CPU time."""
        wall_min, cpu_min = (time.monotonic() - self._started) / 60, time.process_time() / 60
        times = {"wall_min": round(wall_min, 2), "cpu_min": round(cpu_min, 2)}
        self.report({"phase": self.phase, "step": self.step, **values, **times})


def print_report(values: dict[str, object]) -> None:
    """One JSON object per line on standard output."""
    print(json.dumps(values), flush=True)  # noqa: T201 - the program's output
