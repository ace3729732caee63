"""Follow one job: subscribe first, then replay its stream, then forward what the channel brings.

Every subscription, also one after a lost connection, is followed by a replay from the last seq on, so nothing falls
between the two; a gap in the numbers causes another. One Redis connection per active reader. `Follower` blocks its
thread, `AsyncFollower` is the same for asyncio. They know events and endings, not jobs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from typing import Any

import redis
import redis.asyncio
from pydantic import ValidationError

from api_stub.client.pubsub_pool import CONFIRM_S, Subscription, Subscriptions
from api_stub.connections import unavailable
from api_stub.contract import names
from api_stub.contract.event import Event, FinalEvent, parse_event
from api_stub.cursor import EventCursor, ReadTimeouts
from api_stub.errors import UnknownJob
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.verdicts import is_passing
from api_stub.ledger.views import Replay

logger = logging.getLogger(__name__)


class Follower:
    """Reads the events of jobs. Safe to share between threads; each iterator belongs to one."""

    def __init__(self, ledger: Ledger, readers: redis.Redis) -> None:
        self._ledger = ledger
        self._subscriptions = Subscriptions(readers)

    def events(self, job_id: str, after: int = 0, timeout: float | None = None) -> Generator[Event, None, None]:
        """Yield the events after seq `after`, up to the final one. A job whose stream is gone yields its final event.

        Raises TimeoutError after `timeout` seconds without an event, UnknownJob, StoreUnavailable.
        """
        cursor, timeouts = EventCursor(after), ReadTimeouts(timeout)
        while not cursor.is_finished:
            try:
                with self._subscriptions.lend() as subscription:
                    for message in _messages(subscription, names.events_key(job_id), timeouts):
                        events = _forwarded(cursor, message)
                        for event in self._replayed(job_id, cursor, timeouts) if events is None else events:
                            yield event
                            timeouts.heard()
                        if cursor.is_finished:
                            subscription.is_over = True
                            return
            except redis.RedisError as error:
                time.sleep(_pause_s(error, timeouts))

    def ending(self, job_id: str, timeout: float | None = None) -> FinalEvent:
        """Wait at most `timeout` seconds for the job to end; wakes once, by its result's channel.

        Raises TimeoutError, UnknownJob, StoreUnavailable.
        """
        timeouts = ReadTimeouts(timeout)
        while True:
            try:
                with self._subscriptions.lend() as subscription:
                    for _ in _messages(subscription, names.result_key(job_id), timeouts):
                        replay = self._ledger.replay(job_id, after=None)
                        timeouts.connected()
                        if (ending := _ending(job_id, replay)) is not None:
                            subscription.is_over = True
                            return ending
            except redis.RedisError as error:
                time.sleep(_pause_s(error, timeouts))

    def _replayed(self, job_id: str, cursor: EventCursor, timeouts: ReadTimeouts) -> list[Event]:
        replay = self._ledger.replay(job_id, cursor.last_seq)
        timeouts.connected()
        return _caught_up(job_id, cursor, replay)


class AsyncFollower:
    """`Follower` for one event loop: same methods, same meanings, same errors."""

    def __init__(self, ledger: AsyncLedger, readers: redis.asyncio.Redis) -> None:
        self._ledger = ledger
        self._readers = readers

    async def events(self, job_id: str, after: int = 0, timeout: float | None = None) -> AsyncGenerator[Event, None]:
        """Yield the events after seq `after`, up to the final one. A job whose stream is gone yields its final event.

        Raises TimeoutError after `timeout` seconds without an event, UnknownJob, StoreUnavailable. Close the generator
        (`contextlib.aclosing`) when you leave it early.
        """
        cursor, timeouts, cancels = EventCursor(after), ReadTimeouts(timeout), _Cancels()
        while not cursor.is_finished:
            try:
                async with aclosing(self._messages(names.events_key(job_id), timeouts, cancels)) as messages:
                    async for message in messages:
                        events = _forwarded(cursor, message)
                        for event in await self._replayed(job_id, cursor, timeouts) if events is None else events:
                            yield event
                            timeouts.heard()
                        if cursor.is_finished:
                            return
            except redis.RedisError as error:
                await asyncio.sleep(_pause_s(error, timeouts))

    async def ending(self, job_id: str, timeout: float | None = None) -> FinalEvent:
        """Wait at most `timeout` seconds for the job to end; wakes once, by its result's channel.

        Raises TimeoutError, UnknownJob, StoreUnavailable.
        """
        timeouts, cancels = ReadTimeouts(timeout), _Cancels()
        while True:
            try:
                async with aclosing(self._messages(names.result_key(job_id), timeouts, cancels)) as messages:
                    async for _ in messages:
                        replay = await self._ledger.replay(job_id, after=None)
                        timeouts.connected()
                        if (ending := _ending(job_id, replay)) is not None:
                            return ending
            except redis.RedisError as error:
                await asyncio.sleep(_pause_s(error, timeouts))

    async def _messages(
        self, channel: str, timeouts: ReadTimeouts, cancels: _Cancels
    ) -> AsyncGenerator[str | None, None]:
        async with self._readers.pubsub() as subscription:
            await subscription.subscribe(channel)
            message = _confirmed(await subscription.get_message(timeout=CONFIRM_S))
            while message is not None:
                yield message["data"] if message["type"] == "message" else None
                cancels.heed()
                message = await subscription.get_message(timeout=timeouts.wait_s())

    async def _replayed(self, job_id: str, cursor: EventCursor, timeouts: ReadTimeouts) -> list[Event]:
        replay = await self._ledger.replay(job_id, cursor.last_seq)
        timeouts.connected()
        return _caught_up(job_id, cursor, replay)


class _Cancels:
    """Notices that the running task was cancelled although no call raised it.

    `asyncio.wait_for` of Python 3.11, which redis-py sends through, swallows a cancellation that comes together with
    its result (github.com/python/cpython/issues/86296); a reader would then wait on for ever.
    """

    def __init__(self) -> None:
        self._num_before = self._num()

    def heed(self) -> None:
        """Raise the swallowed CancelledError."""
        if self._num() > self._num_before:
            raise asyncio.CancelledError

    @staticmethod
    def _num() -> int:
        task = asyncio.current_task()
        return task.cancelling() if task is not None else 0


def _messages(subscription: Subscription, channel: str, timeouts: ReadTimeouts) -> Generator[str | None, None, None]:
    """Yield None whenever the channel was subscribed (anew), and every message; end after a long silence."""
    message: dict[str, Any] | None = subscription.begin(channel)
    while message is not None:
        yield message["data"] if message["type"] == "message" else None
        message = subscription.next(timeouts.wait_s())


def _pause_s(error: redis.RedisError, timeouts: ReadTimeouts) -> float:
    """Return how long to wait before Redis is asked again. Raises StoreUnavailable when that makes no sense."""
    problem = unavailable(error)
    if not is_passing(error):
        raise problem from error
    return timeouts.pause_s(problem)


def _confirmed(message: Any) -> Any:
    if message is None:
        raise redis.TimeoutError("Redis did not confirm a subscription")
    return message


def _forwarded(cursor: EventCursor, message: str | None) -> tuple[Event, ...] | None:
    """Return what a message brings; None: events are missing before it, replay the stream."""
    if message is None:
        return None
    event = _parsed(message)
    if event is None:
        return ()
    return None if cursor.is_gap(event) else cursor.take(event)


def _caught_up(job_id: str, cursor: EventCursor, replay: Replay) -> list[Event]:
    """Take a replayed stream. A final job ends the reader even without its stream."""
    replayed = [event for raw in replay.events if (event := _parsed(raw)) is not None]
    events = [event for entry in replayed for event in cursor.take(entry)]
    if not cursor.is_finished and (ending := _ending(job_id, replay)) is not None:
        events.extend(cursor.take(ending))
    return events


def _parsed(raw: str) -> Event | None:
    """Read an event; one that this version does not know is passed over."""
    try:
        return parse_event(raw)
    except ValidationError:
        logger.warning("event of an unknown kind skipped", extra={"action": "follow"})
        return None


def _ending(job_id: str, replay: Replay) -> FinalEvent | None:
    if not replay.is_known:
        raise UnknownJob(f"no job {job_id!r}: never submitted, not adopted yet, or its record has expired")
    return replay.ending
