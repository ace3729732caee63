"""What is sent to others when something has happened to a job: webhooks, and the links of plain Celery messages.

A delivery is written in the step that writes its event, so none is forgotten; the links of a job (`link`, `link_error`,
the rest of a chain) are in its row from its adoption on, and the step that ends the job makes them due. A gateway takes
a delivery, a worker a job with links, for a lease; when it dies meanwhile another one takes it again, with the same id:
at least once, while the job's row is kept. What links say is the worker's affair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis
import redis.asyncio

from api_stub.contract.result import FAILURE_CLASS, FAILURE_MODULE
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.settings import LedgerConfig


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one address. `event` is the event's JSON; `tries` counts this one.

    `is_gone`: the address answered a while ago that it does not exist any more.
    """

    id: str
    job_id: str
    type: str
    url: str
    tenant: str
    event: str
    tries: int
    is_gone: bool


class Settlement(StrEnum):
    """How a try went."""

    DELIVERED = "delivered"
    AGAIN = "again"  # it failed; the next one is due after a delay
    LATER = "later"  # it was not tried and does not count
    GIVEN_UP = "given_up"  # listed for the operator, never tried again
    GONE = "gone"  # given up, and so will be all others for this address for a day


class DeliveryQueue:
    """One event loop per instance. Raises redis.RedisError; every call may be repeated."""

    def __init__(self, commands: redis.asyncio.Redis, config: LedgerConfig) -> None:
        self._take = commands.register_script(script(Transition.TAKE_DELIVERIES, config))
        self._settle = commands.register_script(script(Transition.SETTLE_DELIVERY, config))

    async def take(self, limit: int, lease_s: float) -> tuple[Delivery, ...]:
        """Take up to `limit` deliveries that are due; nobody else is given them for `lease_s` seconds."""
        return tuple(_delivery(row) for row in await self._take(args=(limit, lease_s)))

    async def settle(
        self, delivery: Delivery, settlement: Settlement, *, delay_s: float = 0.0, reason: str = ""
    ) -> bool:
        """Write down how a try went; False: the lease had ended and somebody else has taken it since."""
        arguments = (delivery.id, delivery.tries, settlement.value, delay_s, reason)
        return bool(await self._settle(args=arguments))


def _delivery(row: list[Any]) -> Delivery:
    delivery_id, job_id, kind, url, tenant, event, tries, is_gone = row
    return Delivery(delivery_id, job_id, kind, url, tenant, event, int(tries), bool(is_gone))


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
