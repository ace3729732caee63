"""`visionq-worker bench engine|queue|api`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from worker.errors import CannotStart
from worker.observability.logging import configure_logging
from worker.refusal import read_settings, refuse
from worker.settings import LogFormat

bench = typer.Typer(no_args_is_help=True, help="Measure engine, queue and gateway; every figure beside a baseline.")


@bench.command("queue")
def bench_queue(jobs: Annotated[int, typer.Option(min=2, help="jobs of each kind")] = 300) -> None:
    """Measure submit → result of a one-token job beside a bare Celery no-op, in one run."""
    from worker.bench.queue import bench_queue as measure

    typer.echo(measure(jobs).lines())


@bench.command("api")
def bench_api(
    jobs: Annotated[int, typer.Option(min=2, help="submits of each kind")] = 300,
    events: Annotated[int, typer.Option(min=1, help="events of a stream")] = 5000,
    readers: Annotated[int, typer.Option(min=1, help="readers that only wait")] = 1000,
    json: Annotated[Path | None, typer.Option(help="write everything as JSON")] = None,
) -> None:
    """Measure the HTTP gateway beside the bare client, in one run: submitting, following, readers that wait."""
    from worker.bench.api import bench_api as measure

    report = measure(jobs, events, readers)
    typer.echo(report.lines())
    if json is not None:
        json.write_text(report.json(), encoding="utf-8")


@bench.command("engine")
def bench_engine(
    model: Annotated[
        str, typer.Option(help="idefics2-8b-random, idefics2-512x8-random, llava-0.5b-random, or as VISIONQ_MODEL")
    ] = "idefics2-512x8-random",
    jobs: Annotated[int, typer.Option(min=2, help="jobs, all handed in at once")] = 16,
    max_new_tokens: Annotated[str, typer.Option(help="LEAST-MOST new tokens of a job, drawn uniformly")] = "8-96",
    concurrency: Annotated[int, typer.Option(min=1, help="jobs that generate together; size of a static batch")] = 16,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0: torch's own choice")] = 0,
    images: Annotated[int, typer.Option(min=0, help="images per job")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each mode, in turns; the median one is reported")] = 1,
    long_prompt: Annotated[int, typer.Option(min=0, help="tokens of a prompt that arrives among streams")] = 6000,
    rows: Annotated[int, typer.Option(min=0, help="rows of the wide batch whose overhead is measured")] = 64,
    json: Annotated[Path | None, typer.Option(help="write everything as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw it; needs the `bench` extra")] = None,
) -> None:
    """Measure the engine beside sequential and statically batched `generate`: same model, same jobs, one run.

    Leaves with status 1 when the texts of a float32 model differ between modes.
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("drawing needs matplotlib: pip install 'visionq-worker[bench]'", param_hint="--plot")
    new_tokens = _range(max_new_tokens)
    settings = read_settings({})
    configure_logging(LogFormat.TEXT, settings.log_level)
    from worker.bench.engine import BenchOptions
    from worker.bench.engine import bench_engine as measure

    try:
        report = measure(
            model, threads, BenchOptions(jobs, new_tokens, concurrency, images, repeats, long_prompt, rows)
        )
    except CannotStart as error:
        refuse(str(error))
    typer.echo(report.lines())
    if json is not None:
        json.write_text(report.json(), encoding="utf-8")
    if plot is not None:
        from worker.bench.plot import plot as draw

        draw(report, plot)
    if report.must_have_parity and not report.has_parity:
        raise typer.Exit(1)


def _range(text: str) -> tuple[int, int]:
    """Read LEAST-MOST, or one number for both."""
    least, _, most = text.partition("-")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise typer.BadParameter(f"{text!r} is not LEAST-MOST, like 8-96", param_hint="--max-new-tokens")
    return int(least), int(most or least)
