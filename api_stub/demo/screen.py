"""What a person sees of the demo: columns that fill side by side on a terminal, lines with a prefix in a pipe.

How far a job has come is told by its events. Times are Redis' clock, so they need no clock of ours.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

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

MAX_WIDTH = 114
REAL_MODEL = "llava-hf/llava-interleave-qwen-0.5b-hf"


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


class Screen(Protocol):
    """Shows events as they come. `show` gets an event, its job's new state, and the states of all jobs."""

    def __enter__(self) -> Screen: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, event: Event, changed: Progress, everything: Sequence[Progress]) -> None: ...


class ColumnScreen:
    """For a terminal."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=20)

    def __enter__(self) -> ColumnScreen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, event: Event, changed: Progress, everything: Sequence[Progress]) -> None:
        """Draw all columns anew."""
        columns = Table(width=min(MAX_WIDTH, self._live.console.width))
        for progress in everything:
            columns.add_column(progress.task.label, ratio=1, overflow="fold")
        columns.add_row(*(Text(progress.task.text, style="dim") for progress in everything))
        columns.add_row(*(Text(progress.text, style="bold") for progress in everything), end_section=True)
        columns.add_row(*(Text(progress.stage, style="cyan") for progress in everything))
        self._live.update(columns)


class LineScreen:
    """For a pipe or a log file: one line per event, so that it can be seen that the jobs run at once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, str] = {}

    def __enter__(self) -> LineScreen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, event: Event, changed: Progress, everything: Sequence[Progress]) -> None:
        """Print a new stage, or the text that has come."""
        width = max(len(progress.task.label) for progress in everything)
        if isinstance(event, OutputDelta):
            news = f"… {event.text.strip()}"
        elif self._stages.get(changed.job_id) != changed.stage:
            news = f"[{changed.stage}]"
        else:
            return
        self._stages[changed.job_id] = changed.stage
        say(self._console, f"{changed.task.label:<{width}}  {news}")


def screen_for(console: Console) -> Screen:
    """Return the screen that suits where the output goes."""
    return ColumnScreen(console) if console.is_terminal else LineScreen(console)


def say(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours for numbers, no wrapping of what may be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def answers(everything: Sequence[Progress], is_demo_model: bool) -> RenderableType:
    """Return each answer next to the truth, and how long it took."""
    return Group(*(_answer(progress, is_demo_model) for progress in everything))


def _answer(progress: Progress, is_demo_model: bool) -> RenderableType:
    style = ("green" if progress.is_true else "red") if is_demo_model else ""
    queued = _milliseconds(progress.seconds_until(progress.started_at))
    first = _milliseconds(progress.seconds_until(progress.first_token_at))
    total = _milliseconds(progress.seconds_until(progress.ending.ts if progress.ending else None))
    lines = Table.grid(padding=(0, 2))
    lines.add_row("  answer", Text(progress.text or f"({progress.stage})", style=f"bold {style}"))
    lines.add_row("  drawn", Text(progress.task.truth))
    lines.add_row("  time", Text(f"queued {queued}, first token after {first}, answered after {total}", style="dim"))
    return Group(Text.assemble((progress.task.label, "bold"), f": {progress.task.text}"), lines)


def next_steps(is_demo_model: bool, program: str) -> str:
    """Return what to try next. `program` is how this user calls `visionq`."""
    if not is_demo_model:
        return "The answers are a real model's; it need not use the words of whoever drew the scenes."
    return (
        "The model that ships with visionq is tiny and sees drawn shapes only. A real one, from the Hugging Face hub:\n"
        f"  VISIONQ_MODEL={REAL_MODEL} {program} demo\n"
        f"To stay and enqueue jobs of your own: {program} demo --stay"
    )


def invitation(endpoints: Mapping[str, str], uris: Sequence[str], program: str) -> str:
    """Return how to use a demo that stays, from another terminal."""
    exports = "\n".join(f"  export {name}={value}" for name, value in endpoints.items())
    ask_clip = f'\n  {program} video-qa {uris[-1]} --question "What moves?"' if len(uris) > 1 else ""
    url = endpoints.get("VISIONQ_API_URL")
    playground = f"\nPlayground, in a browser: {url}/" if url else ""
    return (
        f"The stack stays until Ctrl-C. In another terminal:\n{exports}\n"
        f"  {program} caption {uris[0]}{ask_clip}{playground}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
