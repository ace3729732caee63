"""From a Celery message to a claim: look the job up, adopt it if it came as a plain message, claim it.

A doorbell carries nothing but an id. A plain message carries the job itself and is written into the ledger first,
so that from here on both are the same. Knows no Celery: tasks.py hands over what the message said.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import redis

from api_stub.contract.error import InvalidJob
from api_stub.contract.job import Job, parse_job
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, JobConflict, Refusal, RefusalReason
from api_stub.ledger.verdicts import is_passing
from worker.jobs.entry import DropReason, Unreadable
from worker.jobs.message import Knock

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Waits between tries of a claim while Redis is away; after the last the reaper brings the job back.
PAUSES_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A claimed job. `problem` says what is wrong with a plain message that is no valid job."""

    claim: Claim
    problem: str | None = None


class Intake:
    """Turns knocks into claims for one worker that serves one model name."""

    def __init__(
        self, ledger: Ledger, *, worker: str, model: str, on_refusal: Callable[[RefusalReason], None] | None = None
    ) -> None:
        self._ledger, self._worker, self._model = ledger, worker, model
        self._on_refusal = on_refusal
        self._stopping = threading.Event()

    def accept(self, knock: Knock) -> Accepted | None:
        """Claim the job of a message; None when there is nothing to do.

        Raises redis.RedisError when Redis stays away, Unreadable when the id belongs to another job.
        """
        problem = None
        if knock.fields is not None:
            job, problem = self._read(knock, knock.fields)
            self._adopt(knock, job)
        token = uuid.uuid4().hex  # a claim whose reply was lost is the same claim when it is repeated
        claim = self._again(lambda: self._ledger.claim(knock.job_id, self._worker, token))
        if isinstance(claim, Refusal):
            logger.info("no claim", extra={"action": "claim", "job_id": knock.job_id, "reason": claim.reason.value})
            if self._on_refusal is not None:
                self._on_refusal(claim.reason)
            return None
        return Accepted(claim, problem)

    def decline(self, job_ids: Sequence[str]) -> None:
        """Have the ledger ring again, for another worker, for jobs whose doorbells were taken here. Any thread.

        Raises nothing: a doorbell that cannot be written now is found missing by a sweep.
        """
        facts = {"action": "decline", "job_ids": list(job_ids)}
        try:
            num_rung = self._ledger.ring_again(job_ids)
        except redis.RedisError as error:
            logger.warning("doorbells not rung again", extra=facts | {"error": type(error).__name__})
        else:
            logger.info("doorbells rung again", extra=facts | {"num_rung": num_rung})

    def close(self) -> None:
        """Stop waiting for Redis."""
        self._stopping.set()

    def _read(self, knock: Knock, fields: Mapping[str, object]) -> tuple[Job | None, str | None]:
        if knock.problem is not None:
            return None, knock.problem
        try:
            job = parse_job({"model": self._model, "priority": knock.priority} | dict(fields), knock.task)
            return job.resolved(knock.job_id), None
        except InvalidJob as error:
            return None, str(error)
        except Exception as error:  # noqa: BLE001 - a producer's own values, in libraries of others
            facts = {"action": "adopt", "job_id": knock.job_id, "error": type(error).__name__}
            logger.error("job cannot be read", extra=facts)
            return None, f"job: cannot be read ({type(error).__name__})"

    def _adopt(self, knock: Knock, job: Job | None) -> None:
        try:
            self._again(
                lambda: self._ledger.adopt(
                    knock.job_id,
                    task=knock.task,
                    model=self._model,
                    job=job,
                    priority=job.priority if job else 6,
                    links=knock.links.to_json() if knock.links else "",
                )
            )
        except JobConflict as error:
            raise Unreadable(DropReason.ID_TAKEN) from error

    def _again(self, call: Callable[[], T]) -> T:
        """Repeat a ledger call while Redis is away; raise its error after the last try, a lasting one at once."""
        for pause_s in PAUSES_S:
            try:
                return call()
            except redis.RedisError as error:
                if not is_passing(error):
                    raise
                logger.warning("ledger away", extra={"action": "claim", "error": type(error).__name__})
                if self._stopping.wait(pause_s):
                    break
        return call()
