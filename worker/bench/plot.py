"""Draws an engine report: tokens per second of each mode, and where an engine's step goes. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from worker.bench.report import EngineReport
from worker.engine.step_times import StepStage


def plot(report: EngineReport, path: Path) -> None:
    """Write a picture; the ending of `path` says which kind."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    speeds, steps = figure.subplots(1, 2)
    _draw_speeds(speeds, report)
    _draw_steps(steps, report)
    figure.suptitle(f"{report.setting.model}, {report.setting.num_jobs} jobs, {report.setting.device}")
    figure.savefig(path, dpi=120)


def _draw_speeds(axes: Any, report: EngineReport) -> None:
    modes = [*report.modes, *([report.peer] if report.peer else [])]
    bars = axes.bar([mode.name for mode in modes], [mode.tokens_per_s for mode in modes])
    base = modes[0].tokens_per_s
    axes.bar_label(bars, [f"{mode.tokens_per_s / base:.2f} ×" for mode in modes])
    axes.set_ylabel("tokens per second")


def _draw_steps(axes: Any, report: EngineReport) -> None:
    modes = [mode for mode in report.modes if mode.step_s]
    left = [0.0] * len(modes)
    for stage in StepStage:
        widths = [mode.step_s[stage] * 1e3 for mode in modes]
        axes.barh([mode.name for mode in modes], widths, left=left, label=stage.value)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("ms per step")
    axes.legend(fontsize="small")
