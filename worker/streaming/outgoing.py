"""What is on its way to a job's readers: a body, or a mark that says when everything before it has arrived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from api_stub.contract.event import DeltaBody, ProgressBody, RunningBody


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
