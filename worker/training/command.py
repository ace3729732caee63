"""`visionq-worker finetune`: one run in this process, told line by line, stopped by SIGINT or SIGTERM.

In: a `Finetuning` whose places may be folders. Out: its result. Knows no command line.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from api_stub.contract.finetune import FinetuneResult, Finetuning
from worker.settings import WorkerSettings
from worker.training.progress import AskStop, Progress, StopReason
from worker.training.run import Places, finetune

#: Seconds between two lines about steps; evaluations and checkpoints are always told.
_SAY_EVERY_S: Final = 5.0


def finetune_here(job: Finetuning, settings: WorkerSettings, say: Callable[[str], None]) -> FinetuneResult:
    """Run a job; `say` gets one line at a time. Raises what `finetune` raises; Stopped after a signal."""
    with tempfile.TemporaryDirectory(prefix="visionq-training-") as directory, _signals() as stop:
        return finetune(
            job,
            places=Places(settings, Path(directory)),
            progress=_Lines(say),
            stop=stop,
            committed=lambda step, uri: say(f"step {step}: checkpoint {uri}"),
        )


def absolute(place: str) -> str:
    """Return the absolute path of a folder; other places (`s3://…`, hub ids, `demo`) as they are."""
    path = Path(place).expanduser()
    is_path = path.exists() or place.startswith(("/", ".", "~"))
    return str(path.resolve()) if is_path and "://" not in place else place


class _Lines:
    """Turns progress into lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said_at = -_SAY_EVERY_S
        self._metrics: object = {}

    def __call__(self, progress: Progress) -> None:
        is_evaluation = progress.metrics is not self._metrics and bool(progress.metrics)
        now = time.monotonic()
        if not is_evaluation and now - self._said_at < _SAY_EVERY_S and progress.step < progress.max_steps:
            return
        self._said_at, self._metrics = now, progress.metrics
        line = f"step {progress.step}/{progress.max_steps}"
        if progress.loss is not None:
            line += f"  loss {progress.loss:.4f}  learning rate {progress.learning_rate:.2e}"
        line += f"  {progress.examples_per_s:.1f} examples/s"
        if progress.eta_s is not None:
            line += f"  {progress.eta_s:.0f} s left"
        if is_evaluation:
            line += "  validation: " + "  ".join(f"{name} {value:.4f}" for name, value in progress.metrics.items())
        self._say(line)


@contextmanager
def _signals() -> Iterator[AskStop]:
    """Return what says whether SIGINT or SIGTERM has come; a second one ends the process as usual."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: StopReason.CANCELLED if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
