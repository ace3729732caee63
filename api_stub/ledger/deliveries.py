"""The ledger's webhooks: events on their way to somebody's address, tried by any gateway, one at a time.

A delivery is written in the step that writes its event, so none is forgotten. A gateway takes it for a lease; when it
dies meanwhile another one takes it again, with the same id: delivered at least once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis.asyncio

from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.lua import Transition, script


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
