"""Sends events to Redis: everything that is waiting goes out in one ledger call, off the engine thread.

In: `Outgoing` items and engine steps (any thread, never blocks). Out: `Ledger.publish`. Progress waits a moment, so
that a short answer goes out together with it; text never does. When Redis is slow or away, waiting deltas of one stream
are joined, so memory stays bounded by the answers' own length and decoding never waits.
A batch whose reply was lost is sent again unchanged; the ledger ignores what it already has. An event that Redis
refuses for good is dropped, and no other with it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

import redis

from api_stub.contract.event import DeltaBody, ProgressBody, RunningBody
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Publication
from api_stub.ledger.verdicts import is_passing


@dataclass(slots=True)
class AttemptStream:
    """The event stream of one attempt. Numbers let the ledger ignore a publication that was sent twice.

    `is_lost` turns true when the ledger says that the attempt no longer owns the job; nothing is sent after that.
    `is_refused` turns true when Redis refuses one of its events for good; the next ones travel alone.
    """

    job_id: str
    fence: int
    is_lost: bool = False
    is_refused: bool = False
    _number: int = field(default=0, repr=False)

    def next_number(self) -> int:
        """Return 1, 2, 3, …: the publisher's thread alone calls this."""
        self._number += 1
        return self._number


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One thing to send for an attempt. `on_sent` runs on the publisher's thread once it and all before it are out."""

    stream: AttemptStream
    body: RunningBody | None
    on_sent: Callable[[], None] | None = None


def merge(first: RunningBody, second: RunningBody) -> RunningBody | None:
    """Return one body that says the same as two neighbours of one stream, or None when they must stay two."""
    if isinstance(first, DeltaBody) and isinstance(second, DeltaBody):
        return DeltaBody(
            text=first.text + second.text, offset=first.offset, num_tokens=first.num_tokens + second.num_tokens
        )
    if isinstance(first, ProgressBody) and isinstance(second, ProgressBody) and first.stage is second.stage:
        return second
    return None


logger = logging.getLogger(__name__)

Step = TypeVar("Step")
Numbered: TypeAlias = tuple[AttemptStream, Publication]

#: How long news of a job's progress waits for other events to go out with. Text and endings wait for nothing.
COMPANY_S: Final = 0.01
FIRST_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 1.0  # a reader notices an outage of Redis before this pause does


class _Stop:
    """Put into the queue to end the thread."""


class Publisher(Generic[Step]):
    """One thread between the engine and Redis. `translate` turns an engine step into Outgoing items, on this thread.

    `is_busy` while it has something to send; `num_turns` grows with every batch and every try to send it. Any thread
    may read them.
    """

    def __init__(self, ledger: Ledger, translate: Callable[[Step], Iterable[Outgoing]]) -> None:
        self._ledger = ledger
        self._translate = translate
        self._queue: queue.SimpleQueue[Outgoing | tuple[Step] | _Stop] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self.num_turns = 0
        self.is_busy = False

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Send what is waiting, then end. During an outage of Redis waiting events are dropped instead."""
        self._stopping.set()
        self._queue.put(_Stop())
        self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    def put(self, outgoing: Outgoing) -> None:
        """Take one item. Items of a stream arrive in the order they were put."""
        self._queue.put(outgoing)

    def put_step(self, step: Step) -> None:
        """Take what an engine step said. Costs the engine thread one queue operation."""
        self._queue.put((step,))

    def _run(self) -> None:
        try:
            self._send_all()
        except Exception:
            # Readers would miss text: the pipeline sees that this thread is gone and gives its jobs back.
            logger.exception("publisher ended", extra={"action": "publish"})

    def _send_all(self) -> None:
        is_open = True
        while is_open:
            taken, is_open = self._take()
            self._send(_joined(taken))
            for item in taken:
                if item.on_sent is not None:
                    item.on_sent()
            self.is_busy = False

    def _take(self) -> tuple[list[Outgoing], bool]:
        """Wait for something, then take all that is there."""
        taken: list[Outgoing] = []
        entry: Outgoing | tuple[Step] | _Stop | None = self._queue.get()
        self.is_busy = True
        self.num_turns += 1
        until = time.monotonic() + COMPANY_S
        while entry is not None:
            if isinstance(entry, _Stop):
                return taken, False
            if isinstance(entry, tuple):
                taken.extend(self._translated(entry[0]))
            else:
                taken.append(entry)
            entry = self._next(taken, until)
        return taken, True

    def _next(self, taken: Sequence[Outgoing], until: float) -> Outgoing | tuple[Step] | _Stop | None:
        """Return what else there is; None: send now."""
        try:
            left_s = until - time.monotonic()
            if left_s > 0 and all(isinstance(item.body, ProgressBody) for item in taken):
                return self._queue.get(timeout=left_s)
            return self._queue.get_nowait()
        except queue.Empty:
            return None

    def _translated(self, step: Step) -> Iterable[Outgoing]:
        try:
            return list(self._translate(step))
        except Exception:
            logger.exception("step lost", extra={"action": "translate"})
            return ()

    def _send(self, batch: Sequence[Numbered]) -> None:
        """Send everything at once; what Redis refuses for good is found by sending one after the other."""
        alone = [item for item in batch if item[0].is_refused]
        together = [item for item in batch if not item[0].is_refused]
        try:
            self._publish(together)
        except redis.RedisError:
            alone = [*batch]
        for item in alone:
            self._send_alone(item)

    def _send_alone(self, item: Numbered) -> None:
        stream = item[0]
        try:
            self._publish([item])
        except redis.RedisError as error:
            if not stream.is_refused:
                facts = {"action": "publish", "job_id": stream.job_id, "error": str(error)}
                logger.warning("events of a job are refused", extra=facts)
            stream.is_refused = True

    def _publish(self, batch: Sequence[Numbered]) -> None:
        """Try until Redis takes the batch. Raises its error when trying again would not help."""
        pause_s = FIRST_PAUSE_S
        while batch:
            self.num_turns += 1
            try:
                held = self._ledger.publish([publication for _, publication in batch])
            except redis.RedisError as error:
                if not is_passing(error):
                    raise
                logger.warning("publish failed", extra={"action": "publish", "error": type(error).__name__})
                if self._stopping.wait(pause_s):
                    return
                pause_s = min(MAX_PAUSE_S, pause_s * 2)
                batch = [item for item in batch if not item[0].is_lost]
                continue
            for (stream, _), is_held in zip(batch, held, strict=True):
                stream.is_lost = stream.is_lost or not is_held
            return


def _joined(items: Iterable[Outgoing]) -> list[Numbered]:
    """Number the bodies, joining neighbours of one stream where nothing is lost by it."""
    waiting: dict[int, list[Outgoing]] = {}
    for item in items:
        if item.body is None or item.stream.is_lost:
            continue
        line = waiting.setdefault(id(item.stream), [])
        last = line[-1].body if line else None
        joined = merge(last, item.body) if last is not None else None
        if joined is None:
            line.append(item)
        else:
            line[-1] = Outgoing(item.stream, joined)
    return [
        (
            item.stream,
            Publication(
                job_id=item.stream.job_id, fence=item.stream.fence, number=item.stream.next_number(), body=item.body
            ),
        )
        for line in waiting.values()
        for item in line
        if item.body is not None
    ]
