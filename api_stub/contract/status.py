"""The states of a job and the transitions between them.

    queued ──▶ in_progress ──▶ completed | failed | cancelled
      │  ▲          │
      │  └──────────┘ a lost worker, a give-back
      └──▶ cancelled | expired

Terminal states are written exactly once. `cancelling` is a flag on `in_progress`, not a state.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class JobStatus(StrEnum):
    """Where a job is. The values are what Redis, HTTP and events carry."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """True when no further transition can happen."""
        return not TRANSITIONS[self]


TRANSITIONS: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    JobStatus.QUEUED: frozenset({JobStatus.IN_PROGRESS, JobStatus.CANCELLED, JobStatus.EXPIRED}),
    JobStatus.IN_PROGRESS: frozenset({JobStatus.QUEUED, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}


class CeleryState(StrEnum):
    """What `AsyncResult.state` shows for a final job."""

    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"


CELERY_STATES: Final[dict[JobStatus, CeleryState]] = {
    JobStatus.COMPLETED: CeleryState.SUCCESS,
    JobStatus.FAILED: CeleryState.FAILURE,
    JobStatus.EXPIRED: CeleryState.FAILURE,
    JobStatus.CANCELLED: CeleryState.REVOKED,
}
