"""Reads text/event-stream: bytes in, events out. No I/O.

Lines are cut at new lines only: an answer's text may hold the other characters that Python cuts lines at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

from pydantic import ValidationError

from api_stub.contract.event import Event, parse_event
from api_stub.http.asks import job_path

logger = logging.getLogger(__name__)

#: A gateway says every 15 s that it lives, unless it is told otherwise. One that is silent this long is asked anew.
LIVE_S: Final = 45.0
#: How much later than asked for a reader may notice a silence.
SLACK_S: Final = 0.5


def stream_path(job_id: str, after: int) -> str:
    """Return the address of a job's events behind a seq."""
    return f"{job_path(job_id)}/events?after={after}"


class EventStreamParser:
    """One per response. Comments and unknown events yield nothing."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take some bytes; yield the events that they complete."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            event = self._taken(line.removesuffix(b"\r"))
            if event is not None:
                yield event

    def _taken(self, line: bytes) -> Event | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        data, self._data = self._data, []
        return _parsed(b"\n".join(data)) if data else None


def _parsed(raw: bytes) -> Event | None:
    try:
        return parse_event(raw)
    except ValidationError:
        logger.warning("unknown event", extra={"action": "follow"})
        return None
