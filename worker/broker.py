"""kombu's Redis transport, with a guard: a list entry or message that is not well made costs itself and nothing else.

Unguarded, an exception on the event loop ends the worker, and the entry waits for the next one to end that too. Entries
that are no JSON are already off the list and are dropped; messages that break whoever receives them are rejected.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from queue import Empty
from typing import Any, Final

import redis
from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport.redis import Channel, Transport

logger = logging.getLogger(__name__)

#: Faults of the connection, not of a message: kombu and Celery reconnect.
_CONNECTION_FAULTS = (redis.RedisError, OSError)


#: Pauses between two tries to reach the broker. kombu's own grow to half a minute, which jobs wait after an outage.
RECONNECT: Final = {"interval_start": 1.0, "interval_step": 0.5, "interval_max": 1.0}


class SwiftConnection(Connection):
    """Comes back soon after an outage."""

    def _ensure_connection(self, *args: Any, **options: Any) -> Any:
        return super()._ensure_connection(*args, **RECONNECT | options)


class SwiftAMQP(AMQP):
    """Makes swift connections. `worker.celery_app` names this class."""

    Connection = SwiftConnection


class GuardedChannel(Channel):
    """Drops list entries that are no messages."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]  # the stubs leave it out
        except (ValueError, TypeError, AttributeError) as error:
            logger.error("list entry dropped", extra={"action": "receive", "error": type(error).__name__})
            raise Empty from error


class GuardedTransport(Transport):
    """Rejects messages that break their receiver. `broker_transport` names this class."""

    Channel = GuardedChannel

    def _deliver(self, message: Any, queue: Any) -> None:
        try:
            super()._deliver(message, queue)
        except _CONNECTION_FAULTS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign message makes of kombu and Celery
            logger.error("message dropped", extra={"action": "receive", "error": type(error).__name__})
            self._drop(message)

    def _drop(self, message: Any) -> None:
        properties = message.get("properties") if isinstance(message, Mapping) else None
        tag = properties.get("delivery_tag") if isinstance(properties, Mapping) else None
        for channel in self.channels or ():
            if isinstance(tag, str) and tag in (channel.qos._delivered or ()):
                channel.basic_reject(tag, requeue=False)
