"""One reader of one job's events: first what the job's stream holds, then what is published, in order and once.

A reader that falls behind further than its mailbox is told by `stream.gap` and goes on from the stream, page by page,
so the gateway keeps little for it however slow it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import redis

from api_stub.contract.event import FinalEvent, StreamGap
from api_stub.cursor import EventCursor
from api_stub.errors import StoreUnavailable, UnknownJob
from api_stub.gateway.broadcaster import EventBroadcaster, Frame, Mailbox
from api_stub.ledger.aio import AsyncLedger

logger = logging.getLogger(__name__)

#: Events that one look into a stream brings at most.
PAGE: Final = 256
#: Looks into streams at the same time, over all readers of a process.
MAX_REPLAYS: Final = 16
#: How long a new reader waits for Redis.
CONNECT_S: Final = 5.0
PAUSE_S: Final = 0.5


class EventReader:
    """Reads one job; see `EventReaders.open`. Not shared between tasks, `leave` excepted."""

    def __init__(
        self, job_id: str, after: int, broadcaster: EventBroadcaster, mailbox: Mailbox, streams: _Streams
    ) -> None:
        self.job_id = job_id
        self._cursor = EventCursor(after)
        self._broadcaster = broadcaster
        self._mailbox = mailbox
        self._streams = streams
        self._has_replayed = False

    @property
    def is_finished(self) -> bool:
        """True after the final event, and when the reader or the gateway has left."""
        return self._cursor.is_finished or self._mailbox.is_closed

    @property
    def has_ending(self) -> bool:
        """True after the final event."""
        return self._cursor.is_finished

    def leave(self) -> None:
        """End the reader from another task."""
        self._mailbox.close()

    def close(self) -> None:
        """Free all that the reader holds. May be called twice."""
        self._broadcaster.leave(self._mailbox)

    async def begin(self) -> list[Frame]:
        """Return the first events, none when there are none yet. Raises UnknownJob, StoreUnavailable."""
        frames = await self.frames(CONNECT_S, is_first=True)
        if not self._has_replayed and not self._mailbox.is_closed:
            raise StoreUnavailable("Redis did not answer: no subscription")
        return frames

    async def frames(self, timeout_s: float, *, is_first: bool = False) -> list[Frame]:
        """Return the next events; none after `timeout_s` seconds of silence or when the reader is finished.

        An absent Redis is silence. After a silence the next call looks into the ledger first: a channel is as silent
        when its event was not published, or when Redis came back empty. Raises UnknownJob when the job's row is gone.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_finished:
            is_replay = self._mailbox.must_replay
            frames = await self._replayed() if is_replay else self._forwarded()
            if frames or (is_first and self._has_replayed):
                return frames or []
            if frames is None:
                await asyncio.sleep(PAUSE_S)
            left_s = deadline - time.monotonic()
            if not self.is_finished and (left_s <= 0 or not await self._came(left_s)):
                self._mailbox.must_replay = True
                return []
        return []

    async def _came(self, left_s: float) -> bool:
        return self._mailbox.must_replay or await self._mailbox.wait(left_s)

    def _forwarded(self) -> list[Frame]:
        frames: list[Frame] = []
        for frame in self._mailbox.take():
            if not self._mailbox.only_final and self._cursor.is_gap(frame.event):
                self._mailbox.ask_to_replay()
                break
            frames.extend(frame for _ in self._cursor.take(frame.event))
        return frames

    async def _replayed(self) -> list[Frame] | None:
        """Look into the stream; None, and the wish to look again, when Redis is away."""
        mailbox, gap = self._mailbox, self._gap()
        mailbox.must_replay, mailbox.dropped_to = False, 0
        try:
            page = await self._streams.page(self.job_id, self._cursor.last_seq, mailbox.only_final)
        except redis.RedisError as error:
            logger.warning("replay failed", extra={"action": "follow", "error": type(error).__name__})
            mailbox.must_replay = True
            return None
        except BaseException:
            mailbox.must_replay = True
            raise
        self._has_replayed = True
        if page.is_full:
            mailbox.must_replay = True
        frames = [frame for frame in page.frames for _ in self._cursor.take(frame.event)]
        return [*gap, *frames]

    def _gap(self) -> list[Frame]:
        first, last = self._cursor.last_seq + 1, self._mailbox.dropped_to
        if not 1 < first <= last or self._mailbox.only_final:
            return []
        # Its seq is that of the event before it: whoever comes back after it misses nothing.
        gap = {"type": "stream.gap", "v": 1, "job_id": self.job_id, "seq": first - 1, "attempt": 0, "ts": time.time()}
        event = StreamGap.model_validate(gap | {"from": first, "to": last})
        return [Frame(event, event.to_json())]


@dataclass(frozen=True, slots=True)
class _Page:
    """What one look into a job's stream brought. `is_full`: there may be more."""

    frames: list[Frame]
    is_full: bool


class _Streams:
    """Looks into jobs' streams, a bounded number at a time: a lost subscription sends all readers here at once."""

    def __init__(self, ledger: AsyncLedger) -> None:
        self._ledger = ledger
        self._turn = asyncio.Semaphore(MAX_REPLAYS)

    async def page(self, job_id: str, last_seq: int, only_final: bool) -> _Page:
        """Return the events after `last_seq`, or the stored final one alone when the stream has no more.

        Raises UnknownJob, redis.RedisError.
        """
        async with self._turn:
            known = await self._ledger.replay(job_id, None if only_final else last_seq, PAGE)
        if not known.is_known:
            raise UnknownJob(f"no job {job_id!r}: never submitted, not adopted yet, or its record has expired")
        frames = [frame for raw in known.events if (frame := Frame.parse(raw)) is not None]
        is_ended = bool(frames) and isinstance(frames[-1].event, FinalEvent)
        is_full = len(known.events) >= PAGE and not is_ended
        if known.ending is not None and not is_full and not is_ended:
            frames.append(Frame(known.ending, known.ending.to_json()))
        return _Page(frames, is_full)


class EventReaders:
    """Opens readers."""

    def __init__(self, ledger: AsyncLedger, broadcaster: EventBroadcaster) -> None:
        self._streams = _Streams(ledger)
        self._broadcaster = broadcaster

    async def open(self, job_id: str, after: int = 0, only_final: bool = False) -> EventReader:
        """Begin to read a job after seq `after`. Close the reader."""
        mailbox = await self._broadcaster.join(job_id, only_final)
        return EventReader(job_id, after, self._broadcaster, mailbox, self._streams)

    async def ending(self, job_id: str, timeout_s: float) -> FinalEvent | None:
        """Wait at most `timeout_s` seconds for the job's final event; None when it did not come. Raises UnknownJob."""
        with closing(await self.open(job_id, only_final=True)) as reader:
            frames = await reader.frames(timeout_s)
        event = frames[-1].event if frames else None
        return event if isinstance(event, FinalEvent) else None
