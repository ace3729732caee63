"""What an attempt has generated so far, and what readers of its event stream shall see of it.

In: the engine's outputs for one attempt. Out: `Outgoing` events for the publisher and, once they are in Redis, the end
of the generation for the job's thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from api_stub.contract.event import DeltaBody, ProgressBody, RunningBody
from worker.engine.request import Finish, RequestOutput


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
    """One event to send for an attempt."""

    stream: AttemptStream
    body: RunningBody


def merge(first: RunningBody, second: RunningBody) -> RunningBody | None:
    """Return one body that stands for two neighbours of one stream, or None when they must stay two."""
    if isinstance(first, DeltaBody) and isinstance(second, DeltaBody):
        return DeltaBody(
            text=first.text + second.text, offset=first.offset, num_tokens=first.num_tokens + second.num_tokens
        )
    if isinstance(first, ProgressBody) and isinstance(second, ProgressBody) and first.stage is second.stage:
        return second
    return None


class AttemptOutput:
    """Text and end of one attempt's generation. Written by the publisher's thread, read by the job's own."""

    def __init__(self, request_id: str, stream: AttemptStream) -> None:
        self.request_id = request_id
        self.stream = stream
        self.num_tokens = 0
        self._texts: list[str] = []
        self._finish: Finish | None = None
        self._has_ended = threading.Event()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    def wait(self, timeout_s: float) -> Finish | None:
        """Return how generation ended, or None when it has not after `timeout_s`.

        It has ended only when all of its events are in Redis.
        """
        return self._finish if self._has_ended.wait(timeout_s) else None

    def add(self, output: RequestOutput) -> Outgoing | None:
        """Add what one engine step generated; return its event, None when there is no new text.

        Raises ValueError, and adds no text, when no event can hold it.
        """
        self.num_tokens += output.num_tokens
        if not output.text:
            return None
        body = DeltaBody(text=output.text, offset=output.offset, num_tokens=output.num_tokens)
        self._texts.append(output.text)
        return Outgoing(self.stream, body)

    def end(self, finish: Finish) -> None:
        """Let the job's thread go on: generation has ended and all of its events have been sent."""
        self._finish = finish
        self._has_ended.set()
