"""What a training run tells while it runs, and how it ends early.

Knows no trainer, no queue and no storage: the run calls `progress` and `committed`, and asks `stop` at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from worker.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is after one step.

    loss: the mean loss per learnt token of this step's examples.
    learning_rate: the one that this step used.
    examples_per_s: of this attempt, without the time of evaluations and checkpoints.
    eta_s: seconds of training that are left at this speed; None before the first step of an attempt.
    metrics: of the last evaluation, name → number; empty before the first.
    """

    step: int
    max_steps: int
    loss: float | None = None
    learning_rate: float = 0.0
    examples_per_s: float = 0.0
    eta_s: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class StopReason(StrEnum):
    """Why a run ends before its last step. All but `lost` leave a checkpoint from which it can be resumed."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    DRAINING = "draining"
    LOST = "lost"  # another attempt has the job: nothing may be written any more


class Stopped(Exception):
    """Raised when a run has ended early.

    checkpoint: URI of the newest checkpoint that can be resumed; None: there is none.
    """

    def __init__(self, reason: StopReason, checkpoint: str | None = None) -> None:
        super().__init__(f"stopped ({reason}), " + (f"resumable from {checkpoint}" if checkpoint else "no checkpoint"))
        self.reason = reason
        self.checkpoint = checkpoint


class TrainingRefused(InvalidRequest):
    """Raised when a run cannot be as it was asked for: base, method, options, output or the state to resume."""


#: Called after every step and every evaluation, on the training thread. It must return quickly.
ReportProgress = Callable[[Progress], None]
#: Asked after every step and every batch of an evaluation: why the run shall stop, None to go on.
AskStop = Callable[[], StopReason | None]
#: Called with the step and the URI of a checkpoint once it is whole and named as the newest one.
ReportCommit = Callable[[int, str], None]
