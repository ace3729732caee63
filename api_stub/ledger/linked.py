"""Jobs for which Celery is to send something when they are over: `link`, `link_error` and chains of plain messages.

The links are in the job's row from its adoption on, and the step that ends the job makes them due, whichever process
takes it. A worker takes a job for a lease, sends and settles; when it dies meanwhile another one sends again: at least
once, while the job's row is kept. What the links say is the worker's affair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import redis

from api_stub.contract.result import FAILURE_CLASS, FAILURE_MODULE
from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.lua import Transition, script


@dataclass(frozen=True, slots=True)
class Linked:
    """A job that is over. `links` is what `Ledger.adopt` was given.

    `result` and `failure` are what Celery's result backend holds; a cancelled job has neither.
    """

    job_id: str
    links: str
    result: Mapping[str, object] | None = None
    failure: Mapping[str, object] | None = None


class LinkedJobs:
    """Safe to share between threads. Raises redis.RedisError; every call may be repeated."""

    def __init__(self, client: redis.Redis, config: LedgerConfig) -> None:
        self._take = client.register_script(script(Transition.TAKE_LINKED, config))
        self._settle = client.register_script(script(Transition.SETTLE_LINKED, config))

    def take(self, limit: int, lease_s: float) -> tuple[Linked, ...]:
        """Take up to `limit` jobs whose links are due; nobody else is given them for `lease_s` seconds."""
        return tuple(_linked(*row) for row in self._take(args=(limit, lease_s)))

    def settle(self, linked: Linked, followers: Sequence[str] = ()) -> None:
        """Forget a job's links.

        `followers` are ids of tasks that fail with it, unless they are jobs themselves or have a result.
        """
        self._settle(args=(linked.job_id, json.dumps(linked.failure, ensure_ascii=False), *followers))


def _linked(job_id: str, links: str, final: str) -> Linked:
    event = json.loads(final)
    if event["type"] == "job.completed":
        return Linked(job_id, links, result=event["result"])
    if event["type"] == "job.cancelled":
        return Linked(job_id, links)
    error = event["error"]
    failure = {
        "exc_type": FAILURE_CLASS,
        "exc_module": FAILURE_MODULE,
        "exc_message": [error["code"], error["message"], error["retryable"]],
    }
    return Linked(job_id, links, failure=failure)
