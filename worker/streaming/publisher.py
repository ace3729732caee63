"""The way of tokens from the engine to Redis, off the engine's thread: all rows of a step go out in one ledger call.

In: the engine's outputs, step by step (`put_step`), and progress of jobs (`put`); any thread, never blocks. Out:
`Ledger.publish`, and then the ends of generations to the threads that wait for them:

    engine step -> TokenMeter.count -> AttemptOutput.add -> joined and numbered -> Ledger.publish -> AttemptOutput.end

Progress waits a moment, so that a short answer goes out together with it; text never does. When Redis is slow or away,
waiting deltas of one stream are joined, so memory stays bounded by the answers' own length and decoding never waits. A
batch whose reply was lost is sent again unchanged; the ledger ignores what it already has. An event that Redis refuses
for good is dropped, and no other with it. An output that cannot be made an event ends its own generation with an error.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import redis

from api_stub.contract.event import ProgressBody
from api_stub.ledger.backoff import Backoff
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Publication
from api_stub.ledger.verdicts import is_passing
from worker.engine.request import Ended, Finish, RequestOutput, error_info
from worker.streaming.output import AttemptOutput, AttemptStream, Outgoing, merge
from worker.streaming.token_meter import TokenMeter

logger = logging.getLogger(__name__)

Numbered: TypeAlias = tuple[AttemptStream, Publication]

#: How long a job's progress waits for other events to go out with. Text and ends wait for nothing.
PROGRESS_WAIT_S: Final = 0.01
#: A reader notices an outage of Redis before the longest pause ends.
RETRIES: Final = Backoff(first_s=0.05, max_s=1.0)


@dataclass(frozen=True, slots=True)
class _Step:
    """The outputs of one engine step and the monotonic time at which they left the engine."""

    outputs: Sequence[RequestOutput]
    at: float


class _Stop:
    """Put into the queue to end the thread."""


_Entry: TypeAlias = Outgoing | _Step | threading.Event | _Stop


@dataclass(slots=True)
class _Batch:
    """What goes out in one ledger call, and whose waiting ends afterwards: generations that ended and flushes."""

    events: list[Outgoing] = field(default_factory=list)
    ended: list[tuple[AttemptOutput, Finish]] = field(default_factory=list)
    flushed: list[threading.Event] = field(default_factory=list)

    @property
    def may_wait(self) -> bool:
        """Whether there is nothing but progress."""
        return not (self.ended or self.flushed) and all(isinstance(event.body, ProgressBody) for event in self.events)


class Publisher:
    """One thread between the engine and Redis.

    `is_busy` while it has something to send; `num_turns` grows with every batch and every try to send it. Any thread
    may read them.
    """

    def __init__(self, ledger: Ledger, meter: TokenMeter) -> None:
        self._ledger = ledger
        self._meter = meter
        self._outputs: dict[str, AttemptOutput] = {}
        self._queue: queue.SimpleQueue[_Entry] = queue.SimpleQueue()
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

    def open(self, request_id: str, stream: AttemptStream) -> AttemptOutput:
        """Collect what the engine generates for a request, and send it as events of `stream`."""
        output = self._outputs[request_id] = AttemptOutput(request_id, stream)
        return output

    def close(self, output: AttemptOutput) -> None:
        """Forget a request; what the engine still generates for it is dropped."""
        self._outputs.pop(output.request_id, None)

    def put(self, outgoing: Outgoing) -> None:
        """Send one event. Events of a stream arrive in the order in which they were put."""
        self._queue.put(outgoing)

    def put_step(self, outputs: Sequence[RequestOutput]) -> None:
        """Send what an engine step generated. Costs the engine thread one queue operation."""
        self._queue.put(_Step(outputs, time.monotonic()))

    def flush(self) -> threading.Event:
        """Return an event that is set once all that was put before is out."""
        flushed = threading.Event()
        self._queue.put(flushed)
        return flushed

    def _run(self) -> None:
        try:
            is_open = True
            while is_open:
                is_open = self._send_next()
        except Exception:
            # Readers would miss text: the pipeline sees that this thread is gone and gives its jobs back.
            logger.exception("publisher thread failed", extra={"action": "publish"})

    def _send_next(self) -> bool:
        """Wait for something and send all that is there; return False when the thread is to end."""
        batch, is_open = self._gather()
        self._send(_joined(batch.events))
        # A job may be finished in the ledger only after its last delta: the final event is the last one.
        for output, finish in batch.ended:
            output.end(finish)
        for flushed in batch.flushed:
            flushed.set()
        self.is_busy = False
        return is_open

    def _gather(self) -> tuple[_Batch, bool]:
        batch = _Batch()
        entry: _Entry | None = self._queue.get()
        self.is_busy = True
        self.num_turns += 1
        until = time.monotonic() + PROGRESS_WAIT_S
        while entry is not None:
            if isinstance(entry, _Stop):
                return batch, False
            if isinstance(entry, _Step):
                self._add_step(batch, entry)
            elif isinstance(entry, Outgoing):
                batch.events.append(entry)
            else:
                batch.flushed.append(entry)
            entry = self._next(batch, until)
        return batch, True

    def _next(self, batch: _Batch, until: float) -> _Entry | None:
        """Return what else there is; None: send now."""
        try:
            left_s = until - time.monotonic()
            if left_s > 0 and batch.may_wait:
                return self._queue.get(timeout=left_s)
            return self._queue.get_nowait()
        except queue.Empty:
            return None

    def _add_step(self, batch: _Batch, step: _Step) -> None:
        try:
            self._meter.count(step.outputs, step.at)
        except Exception:
            logger.exception("tokens not counted", extra={"action": "translate"})
        for generated in step.outputs:
            try:
                self._add(batch, generated)
            except Exception as error:
                logger.exception("output of a job not published", extra={"action": "translate"})
                self._fail(batch, generated, error)

    def _add(self, batch: _Batch, generated: RequestOutput) -> None:
        output = self._outputs.get(generated.request_id)
        if output is None:
            return
        event = output.add(generated)
        if event is not None:
            batch.events.append(event)
        if generated.finish is not None:
            batch.ended.append((output, generated.finish))

    def _fail(self, batch: _Batch, generated: RequestOutput, error: Exception) -> None:
        """End the generation whose output cannot be sent with an error: nobody may wait for the rest of its text."""
        output = self._outputs.pop(getattr(generated, "request_id", ""), None)
        if output is not None:
            info = error_info(error, "an output of the engine")
            batch.ended.append((output, Finish(Ended.FAILED, 0, output.num_tokens, 0.0, 0.0, info)))

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
        num_failures = 0
        while batch:
            self.num_turns += 1
            try:
                held = self._ledger.publish([publication for _, publication in batch])
            except redis.RedisError as error:
                if not is_passing(error):
                    raise
                logger.warning("publish failed", extra={"action": "publish", "error": type(error).__name__})
                num_failures += 1
                if self._stopping.wait(RETRIES.delay_s(num_failures)):
                    return
                batch = [item for item in batch if not item[0].is_lost]
                continue
            for (stream, _), is_held in zip(batch, held, strict=True):
                stream.is_lost = stream.is_lost or not is_held
            return


def _joined(items: Iterable[Outgoing]) -> list[Numbered]:
    """Number the bodies, joining neighbours of one stream where nothing is lost by it."""
    waiting: dict[int, list[Outgoing]] = {}
    for item in items:
        if item.stream.is_lost:
            continue
        line = waiting.setdefault(id(item.stream), [])
        joined = merge(line[-1].body, item.body) if line else None
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
    ]
