"""The messages that a worker has received and not acknowledged (kombu's "QoS").

A plain message is also kept in Redis (the hash `unacked`), as kombu does, and put back if the worker is lost: it is the
only copy of its job. A doorbell is kept in memory only: the ledger has the job, and its reaper finds lost doorbells.
An unreadable copy and a refused write do not affect other messages.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import redis
from kombu.transport.redis import QoS
from kombu.transport.virtual import QoS as LocalQoS

from api_stub.ledger.verdicts import is_passing
from worker.jobs.entry import DropReason

logger = logging.getLogger(__name__)


class GuardedQoS(QoS):
    """Keeps plain messages in Redis and doorbells in memory.

    A doorbell is never put back: the channel reports its job as unanswered. When Redis refuses an acknowledgement, the
    message is redelivered later, and its job is over by then. A message that Redis refuses to keep (`unacked` is not a
    hash, for instance) is handled all the same, and put back from memory if need be.
    """

    channel: Any
    _remove_from_indices: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_memory: dict[str, Any] = {}
        self._late: list[str | dict[str, object]] = []  # still to be put back: tags of copies in Redis, or messages

    def append(self, message: Any, delivery_tag: str) -> None:
        if message.doorbell_id is not None:
            self._keep(message, delivery_tag)
            return
        try:
            super().append(message, delivery_tag)
        except redis.ResponseError as error:
            logger.warning(
                "unacknowledged message not stored in Redis", extra={"action": "receive", "error": str(error)}
            )
            self.channel.leave_wrong_server(error)
            with self.channel.conn_or_acquire() as client:  # it may have been written in part
                self._remove_from_indices(delivery_tag, client.pipeline(transaction=False)).execute(
                    raise_on_error=False
                )
            self._keep(message, delivery_tag)

    def _keep(self, message: Any, delivery_tag: str) -> None:
        self._in_memory[delivery_tag] = message
        LocalQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if self._in_memory.pop(delivery_tag, None) is not None:
            LocalQoS.ack(self, delivery_tag)
            return
        try:
            super().ack(delivery_tag)
        except (redis.RedisError, OSError) as error:
            logger.warning("message not acknowledged", extra={"action": "acknowledge", "error": type(error).__name__})
            self.channel.leave_wrong_server(error)
            LocalQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self.ack(delivery_tag)
            return
        LocalQoS.ack(self, delivery_tag)  # first and in any case, or its thread would never be free again
        self._put_back(delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._put_back_late()
        super().restore_unacked_once(stderr)

    def restore_visible(self, *args: Any, **options: Any) -> None:
        self._put_back_late()
        try:
            super().restore_visible(*args, **options)
        except redis.ResponseError as error:  # kombu tries again later; raised while connecting it would leak a socket
            logger.warning("unacknowledged messages not restored", extra={"action": "receive", "error": str(error)})
            self.channel.leave_wrong_server(error)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put back a message of this worker or of a lost one. A copy that is no message is dropped."""
        message = self._in_memory.pop(tag, None)
        if message is not None:
            if message.doorbell_id is not None:
                self.channel.leave_unanswered(message.doorbell_id)
            else:
                self._put_back(message._raw)
            return
        is_dropped = False

        def restore(pipe: Any) -> None:
            nonlocal is_dropped
            copy = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            is_dropped = False
            if copy is None:
                return  # was acknowledged meanwhile
            try:
                message, exchange, routing_key = json.loads(copy)
                self.channel._do_restore_message(message, exchange or "", routing_key or "", pipe, leftmost)
            except (redis.RedisError, OSError):
                raise
            except Exception:  # noqa: BLE001 - arbitrary bytes may raise anything in json and kombu
                is_dropped = True

        with self.channel.conn_or_acquire(client) as client:
            try:
                client.transaction(restore, self.unacked_key)
            except redis.ResponseError as error:
                if is_passing(error):
                    raise
                logger.warning("unacknowledged messages not restored", extra={"action": "receive", "error": str(error)})
                return
        if is_dropped:
            self.channel.drop(DropReason.UNACKED)

    def _put_back(self, message: str | dict[str, object]) -> bool:
        """Put a message back, or keep it for a later try; return whether it is in its list."""
        try:
            if isinstance(message, str):
                self.restore_by_tag(message, leftmost=True)
            else:
                self._push(message)
        except (redis.RedisError, OSError) as error:
            logger.warning("message not put back yet", extra={"action": "receive", "error": type(error).__name__})
            self.channel.leave_wrong_server(error)
            self._late.append(message)
            return False
        return True

    def _put_back_late(self) -> None:
        late, self._late = self._late, []
        while late and self._put_back(late.pop()):
            pass
        self._late += late  # Redis still refuses, or does not answer

    def _push(self, envelope: dict[str, object]) -> None:
        info: Any = envelope["properties"]
        with self.channel.conn_or_acquire() as client, client.pipeline() as pipe:
            self.channel._do_restore_message(envelope, "", info["delivery_info"]["routing_key"], pipe, True)
            pipe.execute()
