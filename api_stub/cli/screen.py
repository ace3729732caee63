"""What a person or a program sees of a job: stages and text on a terminal, text alone in a pipe, or JSON.

Of fine-tuning: a bar of its steps, then where its checkpoint is.

Text goes to stdout as it arrives; everything about the job goes to stderr, so a pipe carries the answer only.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Protocol, TextIO

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from api_stub.cli.errors import ExitStatus, visible
from api_stub.cli.training_bar import TrainingBar, summary_of
from api_stub.client.handle import JobHandle
from api_stub.contract.event import Event, JobCompleted, JobProgress, JobQueued, JobRetrying, JobStarted, Stage
from api_stub.contract.result import Result
from api_stub.contract.view import JobView
from api_stub.cursor import TextCursor
from api_stub.errors import StoreUnavailable, StreamRestarted


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
        with closing(job.events(timeout=timeout_s)) as events:
            for event in events:
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


def follow(job: JobHandle, as_json: bool, timeout_s: float | None) -> None:
    """Show a job on this process's screen. Ctrl-C says that it goes on, and leaves with its exit status."""
    try:
        show(job, screen(as_json), timeout_s)
    except KeyboardInterrupt:
        typer.echo(f"\njob {job.id} goes on: `visionq watch {job.id}` or `visionq cancel {job.id}`", err=True)
        raise typer.Exit(ExitStatus.INTERRUPTED) from None


class PipeScreen:
    """Text only; warnings go to stderr."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def stage(self, event: Event, job: JobHandle) -> None:
        _warn(event, job)

    def text(self, piece: str) -> None:
        self._out.write(piece)
        self._out.flush()

    def restarted(self, error: StreamRestarted) -> None:
        raise error  # what is in the pipe cannot be taken back

    def completed(self, result: Result) -> None:
        self.text("\n" if result.output_uri is None else f"{visible(result.output_uri)}\n")

    def close(self) -> None:
        pass


class JsonScreen:
    """The result as one line of JSON; warnings go to stderr."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def stage(self, event: Event, job: JobHandle) -> None:
        _warn(event, job)

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
        self._bar = TrainingBar(self._console)
        self._is_writing = False

    def stage(self, event: Event, job: JobHandle) -> None:
        if isinstance(event, JobProgress) and event.stage is Stage.TRAINING:
            self._spinner.stop()
            self._bar.show(event)
            return
        words = _stage(event, job)
        if words is not None and not self._is_writing:
            self._bar.close()
            self._spinner.update(Text(words))
            self._spinner.start()

    def text(self, piece: str) -> None:
        if piece:
            self._spinner.stop()
            self._is_writing = True
            sys.stdout.write(visible(piece))
            sys.stdout.flush()

    def restarted(self, error: StreamRestarted) -> None:
        self.close()
        self._console.print(Text(f"{error}; waiting for the whole answer", style="yellow"))

    def completed(self, result: Result) -> None:
        if result.output_uri is not None:
            self._bar.complete()
            self.close()
            sys.stdout.write(visible(summary_of(result)) + "\n")
            return
        self.close()
        usage, timings = result.usage, result.timings
        words = (
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, first after {timings.first_token_s:.2f} s, "
            f"{timings.total_s:.2f} s in all, ended by {result.finish_reason}; job {result.job_id}"
        )
        self._console.print(Text(words, style="dim"))

    def close(self) -> None:
        self._spinner.stop()
        self._bar.close()
        if self._is_writing:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._is_writing = False


def describe(view: JobView) -> str:
    """Return a job's status in words."""
    lines = [f"{view.job_id}: {view.status}" + (" (cancelling)" if view.cancelling else "")]
    lines.append(f"model {view.model}, served by {view.num_workers} workers, priority {view.priority}")
    lines += view.warnings or ()
    if view.worker is not None:
        lines.append(f"attempt {view.attempt} by {view.worker}")
    if view.result is not None:
        lines.append(view.result.text if view.result.output_uri is None else summary_of(view.result))
    if view.error is not None:
        lines.append(f"{view.error.code}: {view.error.message}")
        lines += map(str, view.error.details or ())
    return visible("\n".join(lines))


def _warn(event: Event, job: JobHandle) -> None:
    if isinstance(event, JobQueued):
        for warning in _warnings(job):
            sys.stderr.write(visible(f"warning: {warning}\n"))
            sys.stderr.flush()


def _warnings(job: JobHandle) -> tuple[str, ...]:
    try:
        return job.status().warnings or ()
    except StoreUnavailable:
        return ()  # an embellishment must not end a watch that survives the outage


def _stage(event: Event, job: JobHandle) -> str | None:
    if isinstance(event, JobQueued):
        warnings = "; ".join(_warnings(job))
        return f"queued: {warnings}" if warnings else "queued"
    if isinstance(event, JobStarted):
        return f"started by {event.worker}"
    if isinstance(event, JobProgress):
        if event.stage is Stage.PREFILL:
            return f"generating after {event.total} tokens of prompt"
        return f"{event.stage} {event.done}/{event.total}" if event.total else str(event.stage)
    if isinstance(event, JobRetrying):
        return f"queued again: {event.reason}"
    return None
