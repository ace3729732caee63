"""Producers, a broker's lists and workers without Celery: doorbells as plain messages, taken in kombu's order."""

from __future__ import annotations

import json

import redis

from api_stub.contract import names
from api_stub.contract.job import Job
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Refusal, Submission
from tests.unit.api_stub.ledger_kit import answer


class Broker:
    """The lists of one model, and the producers and workers around them."""

    def __init__(self, ledger: Ledger, model: str = "default") -> None:
        self.ledger, self.redis, self.model = ledger, ledger.client, model
        self.lists = [names.queue_list(model, step) for step in names.PRIORITY_STEPS]

    def submit(self, job_id: str, job: Job) -> Submission:
        """Hand a job in as a producer does."""
        return self.ledger.submit(job_id, job)

    def ring(self, job_id: str, priority: int) -> None:
        """Push a doorbell."""
        message = json.dumps({"headers": {"id": job_id}})
        self.redis.lpush(names.queue_list(self.model, names.priority_step(priority)), message)

    def receive(self) -> str | None:
        """Take the next doorbell, the most urgent list first; None when all lists are empty."""
        for key in self.lists:
            message = self.redis.rpop(key)
            if message is not None:
                return str(json.loads(str(message))["headers"]["id"])
        return None

    def claim_next(self, worker: str = "worker-1") -> Claim | None:
        """Take doorbells until one is a job's; None when no more are there."""
        while (job_id := self.receive()) is not None:
            claim = self.ledger.claim(job_id, worker)
            if not isinstance(claim, Refusal):
                return claim
        return None

    def finish(self, claim: Claim) -> None:
        """Complete a job."""
        self.ledger.finish(claim.job_id, claim.fence, answer(claim))

    def work(self, num: int) -> list[str]:
        """Do jobs one after the other; return their ids in order."""
        done = []
        while len(done) < num and (claim := self.claim_next()) is not None:
            self.finish(claim)
            done.append(claim.job_id)
        return done


def leftovers(client: redis.Redis) -> set[str]:
    """Keys that must be gone when every job is final."""
    kinds = ("waiting:", "held:", "turns:", "tenants:", "suspects:", "due", "unserved", "num_held")
    return {key for key in client.scan_iter(names.PREFIX + "*") if key.removeprefix(names.PREFIX).startswith(kinds)}
