"""Writes the end of an attempt into the ledger, behind all of its events, however long Redis is away.

In: how an attempt ends. Out: one word for logs and metrics. Every pipeline ends with it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final, Protocol

import redis

from api_stub.contract.event import CompletedBody, FinalBody
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.verdicts import is_passing
from worker.jobs.attempt import Attempt, Attempts, StopReason
from worker.jobs.outcome import GiveBack
from worker.streaming.output import AttemptOutput, AttemptStream, Outgoing

logger = logging.getLogger(__name__)

#: Between two tries to write the end of a job into the ledger, while Redis is away.
FINISH_PAUSE_S: Final = 0.2
#: How long an attempt that has to stop waits for the rest of its text to reach Redis, and how often it looks.
FLUSH_TIMEOUT_S: Final = 5.0
LOOK_S: Final = 0.5


class EventPublisher(Protocol):
    """What pipelines need of a publisher."""

    @property
    def is_alive(self) -> bool: ...
    def open(self, request_id: str, stream: AttemptStream) -> AttemptOutput: ...
    def close(self, output: AttemptOutput) -> None: ...
    def put(self, outgoing: Outgoing) -> None: ...
    def flush(self) -> threading.Event: ...


class Settler:
    """Ends attempts, each in the thread that calls `settle`."""

    def __init__(self, ledger: Ledger, attempts: Attempts, publisher: EventPublisher) -> None:
        self._ledger, self._attempts, self._publisher = ledger, attempts, publisher
        self._pause = threading.Event()

    def settle(self, attempt: Attempt, body: FinalBody | GiveBack | None, *, has_unsent: bool = False) -> str:
        """Write the end into the ledger, however long Redis is away, until it answers or the lease is lost.

        has_unsent: events of a completed attempt may not have been sent yet; those of others are always waited for.
        A process that ends waits no longer than its lease: a reaper finds the job, and it is done again.
        """
        if body is None:
            return "lost"
        if has_unsent or not isinstance(body, CompletedBody):
            self._flush(attempt)  # a complete answer is handed over after its last delta was sent
        job_id, fence = attempt.claim.job_id, attempt.claim.fence
        while attempt.stop_reason is not StopReason.LOST:
            try:
                if isinstance(body, GiveBack):
                    is_ours = self._ledger.give_back(job_id, fence, body.reason, body.pause_s, body.is_charged)
                    return "given_back" if is_ours else "lost"
                return f"{body.type}:{self._ledger.finish(job_id, fence, body).value}"
            except redis.RedisError as error:
                logger.warning(
                    "outcome of a job not recorded yet", extra=facts_of(attempt) | {"error": type(error).__name__}
                )
                if not is_passing(error) or self._is_too_late(attempt):
                    # The lease runs out, and with it one of the job's attempts.
                    facts = {"unconfirmed_s": round(attempt.unconfirmed_s, 3)}
                    logger.error("outcome of a job not recorded", extra=facts_of(attempt) | facts)
                    return "unsettled"
                self._pause.wait(FINISH_PAUSE_S)
        return "lost"

    def _is_too_late(self, attempt: Attempt) -> bool:
        """Whether the drain is over and nobody has confirmed the lease for its whole length."""
        return self._attempts.are_closed and attempt.unconfirmed_s > self._ledger.config.lease_s

    def _flush(self, attempt: Attempt) -> None:
        """Wait until all events of the attempt are in Redis: the final event is the last one.

        Not for ever: a Redis that is full takes an ending and no events, and the ending carries the text anyway.
        """
        sent = self._publisher.flush()
        give_up_at = time.monotonic() + FLUSH_TIMEOUT_S
        while not sent.wait(LOOK_S) and attempt.stop_reason is not StopReason.LOST and time.monotonic() < give_up_at:
            pass


def facts_of(attempt: Attempt) -> dict[str, object]:
    """Return what log lines say about an attempt."""
    claim = attempt.claim
    return {"action": "job", "job_id": claim.job_id, "attempt": claim.attempt, "task": claim.task}
