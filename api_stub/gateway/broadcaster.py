"""One Redis subscription for all readers of a process.

A job's channel is subscribed while somebody reads it. Each message is parsed once and goes into the mailbox of every
reader; a mailbox is bounded, and its reader turns to the job's stream for what it had no room for. Every confirmed
subscription, also one after a lost connection, tells its readers to look into the stream, so nothing falls between.
One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub

from api_stub.contract import names
from api_stub.contract.event import Event, FinalEvent, parse_event
from api_stub.ledger.backoff import Backoff

logger = logging.getLogger(__name__)

#: A subscription that was silent this long is pinged, and replaced when that brings nothing either, or when the name
#: leads to another server by now.
PING_S: Final = 5.0
RECONNECTS: Final = Backoff(first_s=0.05, max_s=2.0)
MAX_MAILBOX: Final = 256
#: Subscribed always: redis-py listens on a connection only while it has a channel.
_IDLE_CHANNEL: Final = names.events_key("")


@dataclass(frozen=True, slots=True)
class Frame:
    """An event, parsed once for all its readers, and its JSON as it came."""

    event: Event
    raw: str

    @classmethod
    def parse(cls, raw: str) -> Frame | None:
        """Read an event; None for one that this version does not know."""
        try:
            return cls(parse_event(raw), raw)
        except ValidationError:
            logger.warning("event of an unknown kind skipped", extra={"action": "follow"})
            return None


class Mailbox:
    """What one reader has not taken yet: at most MAX_MAILBOX frames, and whether it must look into the stream."""

    __slots__ = ("_awake", "_frames", "channel", "dropped_to", "is_closed", "must_replay", "only_final")

    def __init__(self, channel: str, only_final: bool) -> None:
        self.channel = channel
        self.only_final = only_final
        self.must_replay = False
        self.is_closed = False
        #: seq of the newest event that there was no room for; 0: none.
        self.dropped_to = 0
        self._frames: deque[Frame] = deque()
        self._awake = asyncio.Event()

    def put(self, frame: Frame) -> None:
        """Take in a frame, or note that the stream has it."""
        if self.only_final and not isinstance(frame.event, FinalEvent):
            return
        if len(self._frames) >= MAX_MAILBOX or self.dropped_to:
            self._frames.clear()
            self.dropped_to = frame.event.seq
            self.must_replay = True
        else:
            self._frames.append(frame)
        self._awake.set()

    def ask_to_replay(self) -> None:
        """Send the reader to the stream."""
        self.must_replay = True
        self._awake.set()

    def close(self) -> None:
        """Wake the reader for the last time."""
        self.is_closed = True
        self._awake.set()

    def take(self) -> list[Frame]:
        """Return all frames and forget them."""
        frames = list(self._frames)
        self._frames.clear()
        return frames

    async def wait(self, timeout_s: float) -> bool:
        """Wait until something came; False after `timeout_s` seconds without."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._awake.wait()
        is_awake = self._awake.is_set()
        self._awake.clear()
        return is_awake


@dataclass(slots=True)
class _Topic:
    mailboxes: set[Mailbox] = field(default_factory=set)
    is_live: bool = False


class EventBroadcaster:
    """`start()` and `close()` on the loop whose readers it serves. `join` never waits for Redis longer than a write."""

    def __init__(self, readers: redis.asyncio.Redis) -> None:
        self._readers = readers
        self._topics: dict[str, _Topic] = {}
        self._subscription: PubSub | None = None
        self._is_broken = False
        self._writing = asyncio.Lock()
        self._farewells: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_readers(self) -> int:
        """Mailboxes that are open now."""
        return sum(len(topic.mailboxes) for topic in self._topics.values())

    @property
    def num_channels(self) -> int:
        """Channels that somebody reads now."""
        return len(self._topics)

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._listen(), name="event-broadcaster")

    def close_readers(self) -> None:
        """End every reader, now and from now on."""
        self._is_closed = True
        for topic in self._topics.values():
            for mailbox in topic.mailboxes:
                mailbox.close()

    async def close(self) -> None:
        """End every reader and the subscription."""
        self.close_readers()
        if self._task is not None:
            # Asked until it has ended: redis-py on Python 3.11 may swallow a cancellation.
            while not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=1)
            self._task = None
        for farewell in tuple(self._farewells):
            farewell.cancel()

    async def join(self, job_id: str, only_final: bool = False) -> Mailbox:
        """Open a mailbox for a job's events from now on. It must be handed to `leave`."""
        mailbox = Mailbox(names.events_key(job_id), only_final)
        if self._is_closed:
            mailbox.close()
            return mailbox
        topic = self._topics.setdefault(mailbox.channel, _Topic())
        topic.mailboxes.add(mailbox)
        if topic.is_live:
            mailbox.ask_to_replay()
        elif len(topic.mailboxes) == 1:
            try:
                await self._subscribe(mailbox.channel)
            except BaseException:
                self.leave(mailbox)
                raise
        return mailbox

    def leave(self, mailbox: Mailbox) -> None:
        """Forget a mailbox; the last one of a channel ends its subscription. May be called twice."""
        topic = self._topics.get(mailbox.channel)
        if topic is None or mailbox not in topic.mailboxes:
            return
        topic.mailboxes.discard(mailbox)
        if not topic.mailboxes:
            del self._topics[mailbox.channel]
            farewell = asyncio.create_task(self._unsubscribe(mailbox.channel))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    async def _subscribe(self, channel: str) -> None:
        async with self._writing:
            if self._subscription is not None and channel in self._topics:
                try:
                    await self._subscription.subscribe(channel)
                except (redis.RedisError, OSError):
                    self._is_broken = True

    async def _unsubscribe(self, channel: str) -> None:
        async with self._writing:
            if self._subscription is not None and channel not in self._topics:
                try:
                    await self._subscription.unsubscribe(channel)
                except (redis.RedisError, OSError):
                    self._is_broken = True

    async def _listen(self) -> None:
        num_failures = 0
        while not self._is_closed:
            try:
                async with self._readers.pubsub() as subscription:
                    await self._open(subscription)
                    while not self._is_broken and not self._is_closed:
                        if (message := await self._message(subscription)) is not None:
                            num_failures = 0
                            self._dispatch(message)
            # A write of another task may take the connection apart under this one's read, which redis-py answers with
            # whatever that leads to.
            except Exception as error:  # noqa: BLE001
                logger.warning("subscription lost", extra={"action": "follow", "error": type(error).__name__})
            finally:
                self._lose()
            num_failures += 1
            await asyncio.sleep(RECONNECTS.delay_s(num_failures))

    async def _open(self, subscription: PubSub) -> None:
        async with self._writing:
            await subscription.subscribe(_IDLE_CHANNEL, *self._topics)
            self._is_broken = False
            self._subscription = subscription

    def _lose(self) -> None:
        self._subscription = None
        for topic in self._topics.values():
            topic.is_live = False

    async def _message(self, subscription: PubSub) -> dict[str, Any] | None:
        message: dict[str, Any] | None = await subscription.get_message(timeout=PING_S)
        if message is None and not self._is_closed:
            await self._readers.ping()  # a connection that looks whether the name leads elsewhere by now
            async with self._writing:
                await subscription.ping()
            message = await subscription.get_message(timeout=PING_S)
            if message is None:
                raise redis.TimeoutError("the subscription does not answer")
        return message

    def _dispatch(self, message: dict[str, Any]) -> None:
        topic = self._topics.get(message["channel"])
        if topic is None:
            return
        if message["type"] == "subscribe":
            topic.is_live = True
            for mailbox in topic.mailboxes:
                mailbox.ask_to_replay()
        elif message["type"] == "message" and (frame := Frame.parse(message["data"])) is not None:
            for mailbox in topic.mailboxes:
                mailbox.put(frame)
