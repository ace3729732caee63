"""How long to wait before the next try, as one value that says it all."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that grow by `factor` from `first_s` to at most `max_s`.

    `jitter`: the share of a pause that is drawn at random, so that many who wait do not come back together: 0 none, 0.5
    "equal jitter" (AWS Architecture Blog, Exponential Backoff And Jitter).
    """

    first_s: float
    max_s: float
    factor: float = 2.0
    jitter: float = 0.0

    def delay_s(self, num_failures: int) -> float:
        """Return the pause after `num_failures` tries in a row that failed, 1 or more."""
        num_steps = 0
        pause_s = self.first_s
        while num_steps < num_failures - 1 and pause_s < self.max_s:
            pause_s *= self.factor
            num_steps += 1
        pause_s = min(pause_s, self.max_s)
        return pause_s - random.uniform(0.0, self.jitter * pause_s)
