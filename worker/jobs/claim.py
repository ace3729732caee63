"""Claims the job of a message in the ledger.

A doorbell carries only the id of a job that the ledger has. A plain message carries the job itself, which is adopted
(written into the ledger) first; from there on both are the same. Knows no Celery: worker.broker.tasks passes messages.
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
from api_stub.contract.serving import Serving
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, JobConflict, Refusal, RefusalReason
from api_stub.ledger.verdicts import is_passing
from worker.jobs.entry import DropReason, Unreadable
from worker.jobs.message import JobMessage
from worker.jobs.served import Served

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Pauses between tries of a claim while Redis is away. After the last one the message is given up; a sweep of the
#: reaper rings again for the job.
PAUSES_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A claimed job. `problem` says what is wrong with a plain message that is no valid job."""

    claim: Claim
    problem: str | None = None


class Claimer:
    """Claims jobs for one worker that serves one model name. Any thread.

    served: what answers; None where nothing does.
    on_refusal: called with the ledger's reason whenever a job cannot be claimed (taken, finished, unknown, …).
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        worker: str,
        model: str,
        served: Served | None = None,
        on_refusal: Callable[[RefusalReason], None] | None = None,
    ) -> None:
        self._ledger, self._worker, self._model, self._served = ledger, worker, model, served
        self._on_refusal = on_refusal
        self._stopping = threading.Event()

    def claim(self, message: JobMessage) -> ClaimedJob | None:
        """Claim the job of a message; None when the ledger refuses, because the job is taken, over or unknown.

        Raises redis.RedisError when Redis stays away for all of `PAUSES_S`, Unreadable when a plain message's id
        belongs to a job with another body.
        """
        problem = None
        if message.fields is not None:
            job, problem = self._read(message, message.fields)
            self._adopt(message, job)
        token = uuid.uuid4().hex  # makes a repeated claim, whose first reply was lost, the same claim
        serving = Serving() if self._served is None else self._served.now
        claim = self._again(
            lambda: self._ledger.claim(message.job_id, self._worker, token, serving.checkpoint, serving.adapters)
        )
        if isinstance(claim, Refusal):
            logger.info(
                "claim refused", extra={"action": "claim", "job_id": message.job_id, "reason": claim.reason.value}
            )
            if self._on_refusal is not None:
                self._on_refusal(claim.reason)
            return None
        return ClaimedJob(claim, problem)

    def decline(self, job_ids: Sequence[str]) -> None:
        """Write the doorbells of unclaimed jobs again, for another worker: theirs were received here. Any thread.

        Does not raise: a doorbell that cannot be written now is written by the next sweep of the reaper.
        """
        facts = {"action": "decline", "job_ids": list(job_ids)}
        try:
            num_rung = self._ledger.ring_again(job_ids)
        except redis.RedisError as error:
            logger.warning("doorbells not rung again", extra=facts | {"error": type(error).__name__})
        else:
            logger.info("doorbells rung again", extra=facts | {"num_rung": num_rung})

    def close(self) -> None:
        """End the pauses between tries, so that claims in progress fail or succeed at once."""
        self._stopping.set()

    def _read(self, message: JobMessage, fields: Mapping[str, object]) -> tuple[Job | None, str | None]:
        if message.problem is not None:
            return None, message.problem
        try:
            job = parse_job({"model": self._model, "priority": message.priority} | dict(fields), message.task)
            return job.resolved(message.job_id), None
        except InvalidJob as error:
            return None, str(error)
        except Exception as error:  # noqa: BLE001 - a producer's own values, in libraries of others
            facts = {"action": "adopt", "job_id": message.job_id, "error": type(error).__name__}
            logger.error("job cannot be read", extra=facts)
            return None, f"job: cannot be read ({type(error).__name__})"

    def _adopt(self, message: JobMessage, job: Job | None) -> None:
        try:
            self._again(
                lambda: self._ledger.adopt(
                    message.job_id,
                    task=message.task,
                    model=self._model,
                    job=job,
                    priority=job.priority if job else 6,
                    links=message.links.to_json() if message.links else "",
                )
            )
        except JobConflict as error:
            raise Unreadable(DropReason.ID_TAKEN) from error

    def _again(self, call: Callable[[], T]) -> T:
        """Repeat a ledger call while Redis is away; raise a lasting error at once, a passing one after the last try."""
        for pause_s in PAUSES_S:
            try:
                return call()
            except redis.RedisError as error:
                if not is_passing(error):
                    raise
                logger.warning("ledger does not answer", extra={"action": "claim", "error": type(error).__name__})
                if self._stopping.wait(pause_s):
                    break
        return call()
