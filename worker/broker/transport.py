"""kombu's Redis transport, hardened: no list entry, whatever its bytes, can end the worker.

In plain kombu an exception on the event loop ends the worker, and the entry that caused it is redelivered to the next
one. Here `worker.jobs.entry` parses an entry, and Celery gets a message that is built here: well formed and small, with
the producer's body still encoded. A requeue puts back the producer's own message, with a new delivery tag. A Redis that
refuses writes for a moment (full, a replica, short of replicas) is asked again; `judge` classifies errors. kombu passes
most of redis-py's errors on unchanged and wraps some into its own; then the wrapped error decides.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

import redis
from celery.app.amqp import AMQP
from kombu import Connection, exceptions
from kombu.transport.redis import Channel, Transport
from kombu.transport.virtual import Message

from api_stub.contract import names
from api_stub.ledger import verdicts
from api_stub.ledger.verdicts import Verdict
from worker.broker.unclaimed import GuardedQoS
from worker.jobs.entry import DropReason, Entry, Unreadable, read_entry
from worker.jobs.message import FALLBACK_TASK, known_task

logger = logging.getLogger(__name__)

#: The verdict for every class of kombu.exceptions. OSError's subclasses, and others that are not listed, as their base.
CLASSES: Final[Mapping[type[BaseException], Verdict]] = MappingProxyType(
    dict.fromkeys(
        (
            OSError,
            exceptions.TimeoutError,
            exceptions.OperationalError,
            exceptions.ConnectionError,
            exceptions.InconsistencyError,  # the queue's binding was lost; a new connection creates it
            exceptions.LimitExceeded,
            exceptions.ConnectionLimitExceeded,
            exceptions.ChannelLimitExceeded,
        ),
        Verdict.PASSING,
    )
    | dict.fromkeys(
        (
            exceptions.KombuError,
            exceptions.NotBoundError,
            exceptions.MessageStateError,
            exceptions.ChannelError,
            exceptions.ResourceError,
            exceptions.VersionMismatch,
            exceptions.SerializerNotInstalled,
            exceptions.ContentDisallowed,
            exceptions.SerializationError,
            exceptions.EncodeError,
            exceptions.DecodeError,
            exceptions.HttpError,
        ),
        Verdict.LASTING,
    )
)

QUEUE_PREFIX: Final = names.queue("")
#: Pause before a Redis that refused a command is asked again. It blocks the event loop, which only receives.
REFUSED_PAUSE_S: Final = 0.5
#: Pauses between two tries to connect to the broker. kombu's own grow to 30 s, which jobs would wait after an outage.
RECONNECT: Final = {"interval_start": 1.0, "interval_step": 0.5, "interval_max": 1.0}


def judge(error: BaseException) -> Verdict:
    """Return whether an error of kombu, redis-py or a socket is passing or lasting, or of the wrong server."""
    if isinstance(error, redis.RedisError):
        return verdicts.judge(error)
    if isinstance(error, exceptions.OperationalError) and error.__cause__ is not None:
        return judge(error.__cause__)
    return next((CLASSES[kind] for kind in type(error).__mro__ if kind in CLASSES), Verdict.LASTING)


def is_of_connection(error: BaseException) -> bool:
    """Return whether an error is one of the connection to the broker, and not of the message being handled."""
    return isinstance(error, redis.RedisError) or judge(error) is not Verdict.LASTING


class FastReconnection(Connection):
    """A connection to the broker that is retried every second."""

    def _ensure_connection(self, *args: Any, **options: Any) -> Any:
        return super()._ensure_connection(*args, **RECONNECT | options)


class FastReconnectAMQP(AMQP):
    """Makes connections of that class. `worker.broker.app` refers to it by name."""

    Connection = FastReconnection


@dataclass(frozen=True, slots=True)
class Delivery:
    """A parsed entry, and the message that a requeue puts back."""

    entry: Entry
    envelope: dict[str, object]
    delivery_tag: str
    queue: str


class EntryMessage(Message):
    """The message that Celery gets: protocol 2, without eta, expiry, time limits and callbacks, which the pool of
    threads does not support.

    Its only argument is the entry; worker.broker.tasks decodes the producer's body, on a thread.
    """

    def __init__(self, payload: Delivery, channel: Any = None, **options: Any) -> None:
        entry = payload.entry
        job_id = entry.job_id or payload.delivery_tag  # until its body is read
        headers = {
            "lang": "py", "task": (known_task(entry.task) or FALLBACK_TASK).value, "id": job_id, "root_id": job_id,
            "parent_id": None, "group": None, "retries": 0, "timelimit": [None, None], "eta": None, "expires": None,
            "ignore_result": True, "argsrepr": "()", "kwargsrepr": "{}", "origin": None,
        }  # fmt: skip
        embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        made = {
            "body": json.dumps([[], {"entry": entry.to_json()}, embed]),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": {
                "correlation_id": job_id,
                "delivery_tag": payload.delivery_tag,
                "delivery_info": {"exchange": "", "routing_key": payload.queue, "priority": entry.priority},
            },
        }
        super().__init__(made, channel=channel, **options)
        self._raw = payload.envelope
        self.doorbell_id = entry.job_id if entry.is_doorbell else None


class GuardedChannel(Channel):
    """Parses list entries into messages, drops those without a usable id, and waits while Redis refuses commands.

    Its transport options `on_entry`, `on_drop`, `on_unanswered` and `may_consume` are those of `make_app`.
    """

    QoS = GuardedQoS
    Message = EntryMessage
    from_transport_options = (*Channel.from_transport_options, "on_entry", "on_drop", "on_unanswered", "may_consume")
    on_entry: Callable[[], None] | None = None
    on_drop: Callable[[DropReason], None] | None = None
    on_unanswered: Callable[[Sequence[str]], None] | None = None
    may_consume: Callable[[], bool] | None = None
    # Members of kombu's class that its stubs lack.
    connection_errors: tuple[type[Exception], ...]
    _consumers: set[str]
    _in_poll: Any
    _queue_cycle: Any
    _q_for_pri: Callable[[str, int], str]
    _flush_brpop_reauth: Callable[[], None]

    def drop(self, reason: DropReason, **facts: object) -> None:
        """Log and count a message that is dropped, so that its producer gets no answer."""
        logger.error("message dropped", extra={"action": "receive", "reason": reason.value} | facts)
        if self.on_drop is not None:
            self.on_drop(reason)

    def leave_unanswered(self, job_id: str) -> None:
        """Report a doorbell that was received and will not be handled here."""
        if self.on_unanswered is not None:
            self.on_unanswered((job_id,))

    def stop_receiving(self) -> None:
        """Receive nothing more. What the pending BRPOP returns, within its second, is put back at once."""
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        if self._in_poll:
            with suppress(Empty, *self.connection_errors):
                self._brpop_read()

    def _size(self, queue: str) -> int:
        try:
            return int(super()._size(queue))
        except redis.ResponseError as error:  # kombu counts while connecting; the number is not used
            logger.warning("queue length not read", extra={"action": "receive", "error": str(error)})
            return 0

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)  # type: ignore[misc]
        except redis.ResponseError as error:  # receiving from a list needs no binding
            logger.warning("queue not bound", extra={"action": "receive", "error": str(error)})
            self.leave_wrong_server(error)

    def leave_wrong_server(self, error: redis.RedisError | OSError) -> None:
        """Close the connections to a server that is not the writable master; the next use resolves its name again."""
        if judge(error) is Verdict.WRONG_SERVER:
            self.pool.disconnect(inuse_connections=False)
            if (receiving := getattr(self.client, "connection", None)) is not None:  # BRPOP has a connection of its own
                receiving.disconnect()

    def _do_restore_message(
        self, payload: dict[str, Any], exchange: str, routing_key: str, pipe: Any, leftmost: bool = False
    ) -> None:
        """Write a message to its list. Unlike kombu's method, never logs the message, and raises errors to the
        caller.
        """
        if isinstance(headers := payload.get("headers"), dict):
            headers["redelivered"] = True
        priority = self._get_message_priority(payload, reverse=False)
        is_ours = routing_key.startswith(QUEUE_PREFIX)  # needs no bindings, which may be broken in Redis
        for queue in [routing_key] if is_ours else self._lookup(exchange, routing_key):
            push = pipe.lpush if leftmost else pipe.rpush
            push(self._q_for_pri(queue, priority), json.dumps(payload))

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.may_consume is None or self.may_consume():
            super()._brpop_start(timeout)  # type: ignore[misc]

    def _brpop_read(self, **options: Any) -> bool:
        try:
            reply = self._reply(**options)
            if not reply:
                raise Empty
            queue = reply[0].decode().rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self._receive(reply[1], queue)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        return True

    def _reply(self, **options: Any) -> Any:
        connection = self.client.connection
        try:
            return self.client.parse_response(connection, "BRPOP", **options)
        except self.connection_errors:
            connection.disconnect()  # the event loop's next turn connects again
            raise
        except redis.ResponseError as error:
            # Celery would reconnect many times a second, and leak a socket each time.
            logger.warning("broker refuses to deliver messages", extra={"action": "receive", "error": str(error)})
            self.leave_wrong_server(error)
            time.sleep(REFUSED_PAUSE_S)
            raise Empty from error

    def _receive(self, raw: bytes, queue: str) -> None:
        try:
            entry = read_entry(raw)
        except Unreadable as error:
            self.drop(error.reason, num_bytes=len(raw))
        else:
            tag = str(uuid4())
            self.connection._deliver(Delivery(entry, entry.envelope(queue, tag), tag, queue), queue)
        finally:
            if self.on_entry is not None:
                self.on_entry()


class GuardedTransport(Transport):
    """Rejects messages whose handling on the event loop raises. The setting `broker_transport` names this class."""

    Channel = GuardedChannel

    def _deliver(self, message: Any, queue: Any) -> None:
        try:
            super()._deliver(message, queue)
        except Exception as error:  # any exception on the event loop would end the worker
            if is_of_connection(error):  # kombu and Celery reconnect
                raise
            channels: list[Any] = self.channels or []
            for channel in channels:
                if message.delivery_tag in (channel.qos._delivered or ()):
                    channel.drop(DropReason.BROKE, error=type(error).__name__)
                    channel.basic_reject(message.delivery_tag, requeue=False)
