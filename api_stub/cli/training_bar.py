"""How a terminal shows fine-tuning: a bar of its steps with the newest figures, and what it has left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from api_stub.contract.event import JobProgress
from api_stub.contract.result import Result


class TrainingBar:
    """A bar of steps with the newest figures. Starts with the first progress; `close` leaves it on the screen."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
        )
        self._task: TaskID | None = None

    def show(self, event: JobProgress) -> None:
        """Move the bar."""
        figures = figures_of(event.metrics or {})
        if self._task is None:
            self._task = self._progress.add_task("training", total=event.total, figures=figures)
            self._progress.start()
        self._progress.update(self._task, completed=event.done, total=event.total, figures=figures)

    def complete(self) -> None:
        """Fill the bar: the last steps of a job need not have been told."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._progress.tasks[0].total)
        self.close()

    def close(self) -> None:
        """Stop redrawing."""
        self._progress.stop()


def figures_of(metrics: dict[str, float]) -> str:
    """Return figures in words, the time that is left last."""
    words = [f"{name} {value:.4g}" for name, value in metrics.items() if name != "eta_s"]
    if (left_s := metrics.get("eta_s")) is not None:
        minutes, seconds = divmod(round(left_s), 60)
        words.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return ", ".join(words)


def summary_of(result: Result) -> str:
    """Return what a training has left, in words: first the checkpoint's place, then steps and figures."""
    figures = figures_of(result.metrics or {})
    return f"{result.output_uri}\n{result.steps} steps; {figures}; checkpoint {(result.checkpoint or '')[:12]}"
