"""kombu's Redis transport, with a guard: a list entry, whatever it is, costs itself and nothing else.

Unguarded, an exception on the event loop ends the worker, and the entry waits for the next one to end that too. So an
entry is read by `worker.jobs.entry`, and what Celery gets is a message made here: well formed, small enough, its body
still packed. What a requeue puts back is what the producer said, with a delivery tag of our own.
A Redis that refuses writes for a moment (full, a replica, short of replicas) is asked again: `judge` says what an error
means. kombu passes most of redis-py's errors on unchanged and wraps some into its own: then what is behind it decides.
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
from worker.jobs.message import STAND_IN, known_task

#: Every class of kombu.exceptions. Classes of the operating system and subclasses that are not here: as their base.
CLASSES: Final[Mapping[type[BaseException], Verdict]] = MappingProxyType(
    dict.fromkeys(
        (
            OSError,
            exceptions.TimeoutError,
            exceptions.OperationalError,
            exceptions.ConnectionError,
            exceptions.InconsistencyError,  # the queue's binding was lost; whoever connects anew makes it
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


def judge(error: BaseException) -> Verdict:
    """Return what an error of kombu, redis-py or a socket means."""
    if isinstance(error, redis.RedisError):
        return verdicts.judge(error)
    if isinstance(error, exceptions.OperationalError) and error.__cause__ is not None:
        return judge(error.__cause__)
    return next((CLASSES[kind] for kind in type(error).__mro__ if kind in CLASSES), Verdict.LASTING)


def is_of_connection(error: BaseException) -> bool:
    """Tell whether an error came from the broker's side, and so says nothing about the message at hand."""
    return isinstance(error, redis.RedisError) or judge(error) is not Verdict.LASTING


logger = logging.getLogger(__name__)

QUEUE_PREFIX: Final = names.queue("")
#: Before a Redis that refused a command is asked again. The event loop has nothing else to do then.
REFUSED_PAUSE_S: Final = 0.5
#: Pauses between two tries to reach the broker. kombu's own grow to half a minute, which jobs wait after an outage.
RECONNECT: Final = {"interval_start": 1.0, "interval_step": 0.5, "interval_max": 1.0}


class SwiftConnection(Connection):
    """Comes back soon after an outage."""

    def _ensure_connection(self, *args: Any, **options: Any) -> Any:
        return super()._ensure_connection(*args, **RECONNECT | options)


class SwiftAMQP(AMQP):
    """Makes swift connections. `worker.broker.app` names this class."""

    Connection = SwiftConnection


@dataclass(frozen=True, slots=True)
class Delivery:
    """An entry on its way to Celery: what it says, and what a requeue puts back."""

    entry: Entry
    envelope: dict[str, object]
    delivery_tag: str
    queue: str


class EntryMessage(Message):
    """A message of protocol 2 without eta, expiry, time limit or callbacks: none of them works on this pool.

    Its only argument is the entry, whose body nobody has decoded yet: worker.broker.tasks does, on a thread.
    """

    def __init__(self, payload: Delivery, channel: Any = None, **options: Any) -> None:
        entry = payload.entry
        job_id = entry.job_id or payload.delivery_tag  # until its body is read
        headers = {
            "lang": "py", "task": (known_task(entry.task) or STAND_IN).value, "id": job_id, "root_id": job_id,
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
        self.bell_of = entry.job_id if entry.is_doorbell else None


class GuardedChannel(Channel):
    """Makes messages of list entries, drops what is none, and waits while Redis refuses to hand any out.

    The transport option `on_entry` is called for every entry that came off a list, whatever became of it, `on_drop`
    with the reason for each that was dropped, `on_unanswered` with the ids of jobs whose doorbells are left behind.
    While `may_take` says no, nothing is asked for.
    """

    QoS = GuardedQoS
    Message = EntryMessage
    from_transport_options = (*Channel.from_transport_options, "on_entry", "on_drop", "on_unanswered", "may_take")
    on_entry: Callable[[], None] | None = None
    on_drop: Callable[[DropReason], None] | None = None
    on_unanswered: Callable[[Sequence[str]], None] | None = None
    may_take: Callable[[], bool] | None = None
    # kombu's, which its stubs leave out.
    connection_errors: tuple[type[Exception], ...]
    _consumers: set[str]
    _in_poll: Any
    _queue_cycle: Any
    _q_for_pri: Callable[[str, int], str]
    _flush_brpop_reauth: Callable[[], None]

    def drop(self, reason: DropReason, **facts: object) -> None:
        """Tell of a message that is gone without an answer."""
        logger.error("message dropped", extra={"action": "receive", "reason": reason.value} | facts)
        if self.on_drop is not None:
            self.on_drop(reason)

    def leave_unanswered(self, job_id: str) -> None:
        """Tell of a doorbell that is gone without having been answered."""
        if self.on_unanswered is not None:
            self.on_unanswered((job_id,))

    def stop_receiving(self) -> None:
        """Take nothing more. What the last BRPOP still brings, within its second, goes back at once."""
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        if self._in_poll:
            with suppress(Empty, *self.connection_errors):
                self._brpop_read()

    def _size(self, queue: str) -> int:
        try:
            return int(super()._size(queue))
        except redis.ResponseError as error:  # asked for while connecting, by nobody who needs it
            logger.warning("not counted", extra={"action": "receive", "error": str(error)})
            return 0

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)  # type: ignore[misc]
        except redis.ResponseError as error:  # whoever takes messages off a list needs no binding
            logger.warning("not bound", extra={"action": "receive", "error": str(error)})
            self.leave_wrong_server(error)

    def leave_wrong_server(self, error: redis.RedisError | OSError) -> None:
        """Close the connections to a server that is no writable master; the next use looks its name up anew."""
        if judge(error) is Verdict.WRONG_SERVER:
            self.pool.disconnect(inuse_connections=False)
            if (receiving := getattr(self.client, "connection", None)) is not None:  # a reader keeps its connection
                receiving.disconnect()

    def _do_restore_message(
        self, payload: dict[str, Any], exchange: str, routing_key: str, pipe: Any, leftmost: bool = False
    ) -> None:
        """Write a message to its list. Unlike kombu's, never logs it, and lets errors out to whoever knows better."""
        if isinstance(headers := payload.get("headers"), dict):
            headers["redelivered"] = True
        priority = self._get_message_priority(payload, reverse=False)
        is_ours = routing_key.startswith(QUEUE_PREFIX)  # whatever a broken table of bindings says
        for queue in [routing_key] if is_ours else self._lookup(exchange, routing_key):
            push = pipe.lpush if leftmost else pipe.rpush
            push(self._q_for_pri(queue, priority), json.dumps(payload))

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.may_take is None or self.may_take():
            super()._brpop_start(timeout)  # type: ignore[misc]

    def _brpop_read(self, **options: Any) -> bool:
        try:
            reply = self._reply(**options)
            if not reply:
                raise Empty
            queue = reply[0].decode().rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self._take(reply[1], queue)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        return True

    def _reply(self, **options: Any) -> Any:
        connection = self.client.connection
        try:
            return self.client.parse_response(connection, "BRPOP", **options)
        except self.connection_errors:
            connection.disconnect()  # the next turn of the loop connects anew
            raise
        except redis.ResponseError as error:
            # Celery would connect anew, many times a second, and leave a socket open each time.
            logger.warning("broker refuses", extra={"action": "receive", "error": str(error)})
            self.leave_wrong_server(error)
            time.sleep(REFUSED_PAUSE_S)
            raise Empty from error

    def _take(self, raw: bytes, queue: str) -> None:
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
    """Rejects messages that break their receiver. `broker_transport` names this class."""

    Channel = GuardedChannel

    def _deliver(self, message: Any, queue: Any) -> None:
        try:
            super()._deliver(message, queue)
        except Exception as error:  # a net under Celery: what is left of a message's odd ways
            if is_of_connection(error):  # kombu and Celery reconnect
                raise
            channels: list[Any] = self.channels or []
            for channel in channels:
                if message.delivery_tag in (channel.qos._delivered or ()):
                    channel.drop(DropReason.BROKE, error=type(error).__name__)
                    channel.basic_reject(message.delivery_tag, requeue=False)
