"""How far one job has come, as its events tell it. Times are Redis' clock, so they need no clock of ours."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from api_stub.contract.event import (
    Event,
    FinalEvent,
    JobCompleted,
    JobProgress,
    JobQueued,
    JobRetrying,
    JobStarted,
    OutputDelta,
    StreamGap,
)
from api_stub.contract.result import Result
from api_stub.demo.tasks import DemoTask
from api_stub.errors import VisionqError


@dataclass(frozen=True, slots=True)
class Progress:
    """One job's state. `after(event)` is the next one. Times are seconds since 1970, None until known."""

    task: DemoTask
    job_id: str
    stage: str = "submitted"
    text: str = ""
    queued_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    ending: FinalEvent | None = None

    def after(self, event: Event) -> Progress:
        """Return the state after `event`."""
        match event:
            case JobQueued():
                return replace(self, stage="queued", queued_at=event.ts)
            case JobStarted():
                return replace(self, stage="started", started_at=event.ts, text="", first_token_at=None)
            case JobProgress():
                return replace(self, stage=str(event.stage))
            case OutputDelta():
                first_at = self.first_token_at or event.ts
                return replace(self, stage="generating", text=self.text + event.text, first_token_at=first_at)
            case JobRetrying():
                return replace(self, stage=f"queued again ({event.reason})", text="")
            case StreamGap():
                return self
        return replace(self, stage=event.type.removeprefix("job."), ending=event)

    @property
    def result(self) -> Result | None:
        """The answer, when there is one."""
        return self.ending.result if isinstance(self.ending, JobCompleted) else None

    @property
    def is_streamed(self) -> bool:
        """Tell whether the pieces that arrived make up the answer that was stored."""
        return self.result is not None and self.text == self.result.text

    @property
    def is_true(self) -> bool:
        """Tell whether the answer is what was drawn."""
        return self.result is not None and _plain(self.result.text) == _plain(self.task.truth)

    def seconds_until(self, moment: float | None) -> float:
        """Return the seconds from submit to `moment`; 0 when either is not known."""
        return 0.0 if moment is None or self.queued_at is None else moment - self.queued_at


class Followed(Protocol):
    """A job that was handed in, whichever way."""

    @property
    def id(self) -> str: ...
    def events(self, *, timeout: float | None = None) -> Generator[Event, None, None]: ...


class Follow:
    """Follows jobs, one thread each; `take` hands their events to the one thread that shows them."""

    def __init__(self, handles: Sequence[Followed], silence_s: float) -> None:
        self._inbox: queue.SimpleQueue[tuple[int, Event | Exception]] = queue.SimpleQueue()
        for index, handle in enumerate(handles):
            threading.Thread(target=self._read, args=(index, handle, silence_s), daemon=True).start()

    def take(self, timeout_s: float) -> tuple[int, Event] | None:
        """Return the next event and the index of its job, None after `timeout_s`. Raises what its reader met."""
        try:
            index, event = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Exception):
            raise event
        return index, event

    def _read(self, index: int, handle: Followed, silence_s: float) -> None:
        try:
            with closing(handle.events(timeout=silence_s)) as events:
                for event in events:
                    self._inbox.put((index, event))
        except (VisionqError, TimeoutError) as error:
            self._inbox.put((index, error))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
