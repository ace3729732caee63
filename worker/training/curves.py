"""Draws how a training run went: loss, learning rate and the scores of its evaluations over its steps.

In: a run's history. Out: a picture. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from worker.training.state import Entry

#: Only entries of training have it; the others are evaluations.
_RATE: Final = "learning_rate"
_LOSS: Final = "loss"
_WIDTH, _HEIGHT, _COLUMNS = 5.0, 3.2, 2


def draw_curves(history: Sequence[Entry], path: Path) -> None:
    """Write a picture; the ending of `path` says which kind. Raises ValueError for an empty history."""
    if not history:
        raise ValueError("the run has no history yet")
    figures = sorted({name for entry in history for name in entry.values} - {_LOSS})
    names = [_LOSS, *figures]
    rows = -(-len(names) // _COLUMNS)
    figure = Figure(figsize=(_WIDTH * _COLUMNS, _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, names, strict=False):
        _draw(axes, history, name)
    for axes in list(figure.axes)[len(names) :]:
        axes.remove()
    figure.savefig(path, dpi=120)


def points(history: Sequence[Entry], name: str, *, of_training: bool) -> tuple[list[int], list[float]]:
    """Return steps and values of one figure, measured in training or by evaluations."""
    chosen = [entry for entry in history if name in entry.values and (_RATE in entry.values) is of_training]
    return [entry.step for entry in chosen], [entry.values[name] for entry in chosen]


def _draw(axes: Any, history: Sequence[Entry], name: str) -> None:
    for label, of_training, style in (("training", True, "-"), ("validation", False, "o-")):
        steps, values = points(history, name, of_training=of_training)
        if steps:
            axes.plot(steps, values, style, label=label, markersize=3)
    axes.set_title(name)
    axes.set_xlabel("step")
    axes.legend(fontsize="small")
