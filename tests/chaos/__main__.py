"""`python -m tests.chaos`: break everything for a while and tell whether a promise was broken. Status 1 if one was."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tests.chaos.faults import FaultKind
from tests.chaos.run import Options, run

DEFAULTS = Options()
#: Seconds between SIGKILLs: the killed worker is back before the third after it.
SIGKILL_EVERY_S = 8.0


def main(
    seconds: Annotated[float, typer.Option(min=1, help="how long faults and load last")] = DEFAULTS.seconds,
    jobs: Annotated[int, typer.Option(min=1, help="jobs, spread evenly")] = DEFAULTS.jobs,
    seed: Annotated[int, typer.Option(help="the same seed makes the same jobs and faults")] = DEFAULTS.seed,
    every: Annotated[float, typer.Option(min=0.1, help="mean seconds between faults")] = DEFAULTS.every_s,
    sigkills: Annotated[int, typer.Option(min=0, help="nothing but so many SIGKILLs of workers")] = 0,
    kind: Annotated[list[FaultKind] | None, typer.Option(help="only these faults")] = None,
) -> None:
    """Run real servers, workers, producers and readers; break them on a schedule; audit what is left."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("celery").setLevel(logging.ERROR)
    logging.getLogger("api_stub").setLevel(logging.ERROR)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}
    options = Options(seconds=seconds, jobs=jobs, seed=seed, every_s=every, kinds=tuple(kind or FaultKind))
    if sigkills:
        options = replace(
            options,
            seconds=sigkills * SIGKILL_EVERY_S,
            every_s=SIGKILL_EVERY_S,
            kinds=(FaultKind.SIGKILL,),
            max_faults=sigkills,
            min_others=(1,),
            takeover_s=0.0,
        )
    directory = Path(tempfile.mkdtemp(prefix="visionq-chaos-"))
    typer.echo(f"logs in {directory}")
    report = run(options, directory, f"python -m tests.chaos {' '.join(sys.argv[1:])} (seed {seed})")
    typer.echo(report.lines())
    sys.exit(1 if report.problems or report.misses else 0)


if __name__ == "__main__":
    typer.run(main)
