"""What a person sees of the demo: columns that fill side by side on a terminal, lines with a prefix in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from api_stub.contract.event import Event, OutputDelta
from api_stub.demo.progress import Progress

MAX_WIDTH = 114
REAL_MODEL = "llava-hf/llava-interleave-qwen-0.5b-hf"


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
    url = endpoints.get("VISIONQ_API_URL")
    playground = f"\nPlayground, in a browser: {url}/" if url else ""
    return (
        f"The stack stays until Ctrl-C. In another terminal:\n{exports}\n"
        f'  {program} caption {uris[0]}\n  {program} video-qa {uris[-1]} --question "What moves?"{playground}'
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
