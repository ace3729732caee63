"""kombu's Redis transport, with a guard: a list entry or message that is not well made costs itself and nothing else.

Unguarded, an exception on the event loop ends the worker, and the entry waits for the next one to end that too. Entries
that are no JSON are already off the list and are dropped; messages that break whoever receives them are rejected.
A Redis that refuses writes for a moment (full, a replica, short of replicas) is asked again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any, Final

import redis
from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport.redis import Channel, QoS, Transport
from kombu.transport.virtual import QoS as LocalQoS

logger = logging.getLogger(__name__)

#: Faults of the connection, not of a message: kombu and Celery reconnect.
_CONNECTION_FAULTS = (redis.RedisError, OSError)


#: Before a Redis that refused a command is asked again. The event loop has nothing else to do then.
REFUSED_PAUSE_S: Final = 0.5
#: Pauses between two tries to reach the broker. kombu's own grow to half a minute, which jobs wait after an outage.
RECONNECT: Final = {"interval_start": 1.0, "interval_step": 0.5, "interval_max": 1.0}


class SwiftConnection(Connection):
    """Comes back soon after an outage."""

    def _ensure_connection(self, *args: Any, **options: Any) -> Any:
        return super()._ensure_connection(*args, **RECONNECT | options)


class SwiftAMQP(AMQP):
    """Makes swift connections. `worker.celery_app` names this class."""

    Connection = SwiftConnection


class GuardedQoS(QoS):
    """Lets go of a message whose acknowledgement Redis refuses: it comes back once more, and its job is over then."""

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)
        except redis.ResponseError as error:
            logger.warning("not acknowledged", extra={"action": "acknowledge", "error": str(error)})
            LocalQoS.ack(self, delivery_tag)

    def restore_visible(self, *args: Any, **options: Any) -> None:
        try:
            super().restore_visible(*args, **options)
        except redis.ResponseError as error:  # kombu looks again later; raised while connecting it leaves a socket open
            logger.warning("not restored", extra={"action": "receive", "error": str(error)})


class GuardedChannel(Channel):
    """Drops list entries that are no messages, and waits while Redis refuses to hand any out.

    The transport option `on_entry` is called for every entry that came off a list, whatever became of it.
    """

    QoS = GuardedQoS
    from_transport_options = (*Channel.from_transport_options, "on_entry")
    on_entry: Callable[[], None] | None = None

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)  # type: ignore[misc]  # the stubs leave it out
        except redis.ResponseError as error:  # whoever takes messages off a list needs no binding
            logger.warning("not bound", extra={"action": "receive", "error": str(error)})

    def _brpop_read(self, **options: Any) -> Any:
        try:
            is_read = super()._brpop_read(**options)  # type: ignore[misc]  # the stubs leave it out
        except redis.ResponseError as error:
            # Celery would connect anew, many times a second, and leave a socket open each time.
            logger.warning("broker refuses", extra={"action": "receive", "error": str(error)})
            time.sleep(REFUSED_PAUSE_S)
            raise Empty from error
        except (ValueError, TypeError, AttributeError) as error:
            logger.error("list entry dropped", extra={"action": "receive", "error": type(error).__name__})
            self._tell()
            raise Empty from error
        self._tell()
        return is_read

    def _tell(self) -> None:
        if self.on_entry is not None:
            self.on_entry()


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
