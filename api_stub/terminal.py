"""What a person or a program sees of a job: stages and text on a terminal, text alone in a pipe, or JSON.

Text goes to stdout as it arrives; everything about the job goes to stderr, so a pipe carries the answer only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Final, Protocol, TextIO

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from api_stub.contract.event import Event, JobCompleted, JobProgress, JobQueued, JobRetrying, JobStarted
from api_stub.contract.result import Result
from api_stub.contract.status import JobStatus
from api_stub.contract.view import JobView
from api_stub.cursor import TextCursor
from api_stub.errors import JobFailed, QueueFull, StorageRefused, StoreUnavailable, StreamRestarted, VisionqError
from api_stub.handle import JobHandle

#: Control characters of a model's text become visible signs: a terminal must not obey them.
_VISIBLE: Final = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(0x7F, 0xA0), 0xFFFD
)


class ExitStatus(IntEnum):
    """What a command's exit status says."""

    OK = 0
    JOB_FAILED = 1
    INVALID = 2
    UNAVAILABLE = 3
    TIMED_OUT = 4
    INTERRUPTED = 130


_STATUS: Final = {
    StoreUnavailable.code: ExitStatus.UNAVAILABLE,
    StorageRefused.code: ExitStatus.UNAVAILABLE,
    QueueFull.code: ExitStatus.UNAVAILABLE,
    StreamRestarted.code: ExitStatus.JOB_FAILED,
}


class Screen(Protocol):
    """Where a followed job is shown."""

    def stage(self, event: Event, job: JobHandle) -> None:
        """Show where the job is."""

    def text(self, piece: str) -> None:
        """Show new text."""

    def restarted(self, error: StreamRestarted) -> None:
        """A new attempt's text differs from what was shown. Raises `error` when that cannot be mended."""

    def completed(self, result: Result) -> None:
        """Show the end of a good job."""

    def close(self) -> None:
        """Leave the screen in order."""


def screen(as_json: bool) -> Screen:
    """Return the screen that fits this process's stdout."""
    if as_json:
        return JsonScreen(sys.stdout)
    return TerminalScreen() if sys.stdout.isatty() else PipeScreen(sys.stdout)


def show(job: JobHandle, on: Screen, timeout_s: float | None) -> None:
    """Follow a job to its end. Raises JobFailed, StreamRestarted and what `JobHandle.events` raises."""
    text = TextCursor()
    try:
        for event in job.events(timeout=timeout_s):
            on.stage(event, job)
            try:
                piece = text.take(event)
            except StreamRestarted as error:
                on.restarted(error)
                text = TextCursor()
                piece = text.take(event)
            on.text(piece)
            if isinstance(event, JobCompleted):
                on.completed(event.result)
    finally:
        on.close()


@contextmanager
def reported(as_json: bool, job_id: str | None = None) -> Iterator[None]:
    """Turn errors into a line on stderr, or a JSON object on stdout, and an exit status."""
    try:
        yield
    except JobFailed as error:
        _report(as_json, job_id, ErrorLine(error.code, error.message, error.retryable))
        raise typer.Exit(ExitStatus.JOB_FAILED) from error
    except TimeoutError as error:
        _report(as_json, job_id, ErrorLine("timeout", f"{error}; the job goes on", True))
        raise typer.Exit(ExitStatus.TIMED_OUT) from error
    except VisionqError as error:
        is_busy = isinstance(error, (StoreUnavailable, QueueFull))
        _report(as_json, job_id, ErrorLine(error.code, str(error), is_busy))
        raise typer.Exit(_STATUS.get(error.code, ExitStatus.INVALID)) from error
    except BrokenPipeError:
        raise  # whoever read stdout has left; typer ends the program quietly
    except OSError as error:
        _report(as_json, job_id, ErrorLine("invalid_request", f"{error.filename}: {error.strerror}", False))
        raise typer.Exit(ExitStatus.INVALID) from error


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """An error as it is printed; the same three members that a failed job has."""

    code: str
    message: str
    retryable: bool


def _report(as_json: bool, job_id: str | None, error: ErrorLine) -> None:
    if as_json:
        named = {} if job_id is None else {"job_id": job_id}
        typer.echo(json.dumps(named | {"error": asdict(error)}, ensure_ascii=False))
    else:
        typer.echo(f"{error.code}: {error.message}".translate(_VISIBLE), err=True)


class PipeScreen:
    """Text only."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def stage(self, event: Event, job: JobHandle) -> None:
        pass

    def text(self, piece: str) -> None:
        self._out.write(piece)
        self._out.flush()

    def restarted(self, error: StreamRestarted) -> None:
        raise error  # what is in the pipe cannot be taken back

    def completed(self, result: Result) -> None:
        self.text("\n")

    def close(self) -> None:
        pass


class JsonScreen:
    """The result as one line of JSON."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def stage(self, event: Event, job: JobHandle) -> None:
        pass

    def text(self, piece: str) -> None:
        pass

    def restarted(self, error: StreamRestarted) -> None:
        pass

    def completed(self, result: Result) -> None:
        self._out.write(result.to_json() + "\n")
        self._out.flush()

    def close(self) -> None:
        pass


class TerminalScreen:
    """A spinner with the stage until text comes, then the text, then what it took."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._spinner = Status("submitted", console=self._console)
        self._is_writing = False

    def stage(self, event: Event, job: JobHandle) -> None:
        words = _stage(event, job)
        if words is not None and not self._is_writing:
            self._spinner.update(Text(words))
            self._spinner.start()

    def text(self, piece: str) -> None:
        if piece:
            self._spinner.stop()
            self._is_writing = True
            sys.stdout.write(piece.translate(_VISIBLE))
            sys.stdout.flush()

    def restarted(self, error: StreamRestarted) -> None:
        self.close()
        self._console.print(Text(f"{error}; waiting for the whole answer", style="yellow"))

    def completed(self, result: Result) -> None:
        self.close()
        usage, timings = result.usage, result.timings
        words = (
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, first after {timings.first_token_s:.2f} s, "
            f"{timings.total_s:.2f} s in all, ended by {result.finish_reason}"
        )
        self._console.print(Text(words, style="dim"))

    def close(self) -> None:
        self._spinner.stop()
        if self._is_writing:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._is_writing = False


def describe(view: JobView) -> str:
    """Return a job's status in words."""
    lines = [f"{view.job_id}: {view.status}" + (" (cancelling)" if view.cancelling else "")]
    lines.append(f"model {view.model}, served by {view.num_workers} workers, priority {view.priority}")
    if view.worker is not None:
        lines.append(f"attempt {view.attempt} by {view.worker}")
    if view.result is not None:
        lines.append(view.result.text)
    if view.error is not None:
        lines.append(f"{view.error.code}: {view.error.message}")
    return "\n".join(lines).translate(_VISIBLE)


def _stage(event: Event, job: JobHandle) -> str | None:
    if isinstance(event, JobQueued):
        view = job.status()
        is_waiting = view.status is JobStatus.QUEUED and not view.num_workers
        return f"queued: no worker serves {event.model!r} yet" if is_waiting else "queued"
    if isinstance(event, JobStarted):
        return f"started by {event.worker}"
    if isinstance(event, JobProgress):
        return f"{event.stage} {event.done}/{event.total}" if event.total else str(event.stage)
    if isinstance(event, JobRetrying):
        return f"queued again: {event.reason}"
    return None
