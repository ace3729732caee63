"""`make chaos` and `make soak`, short: promises are checked in full, figures that a busy machine spoils are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import run, soak
from tests.chaos.faults import FaultKind

pytestmark = pytest.mark.check


def test_a_short_chaos_breaks_no_promise(tmp_path: Path) -> None:
    options = run.Options(
        seconds=26,
        jobs=90,
        seed=4,
        every_s=1.35,
        min_others=(1,),
        num_pictures=3,
        num_clips=1,
        num_calm_cancels=0,
        outage_s=0,
        takeover_s=0,
    )
    report = run.run(options, tmp_path, "tests/e2e/test_chaos.py")
    assert report.problems == [], report.lines()
    assert len(report.outcomes) >= 90
    assert len(report.injected) >= 12, report.lines()
    assert {FaultKind.FAILOVER, FaultKind.JUNK} <= {each.fault.kind for each in report.injected}, report.lines()


def test_a_short_soak_grows_neither_threads_nor_files_nor_keys(tmp_path: Path) -> None:
    options = soak.Options(minutes=0.2, every_s=1.0, num_pictures=3, num_clips=1, kept_s=8)
    soaked = soak.soak(options, tmp_path)
    assert soaked.problems == [], soaked.lines()
    assert soaked.num_jobs == 48
    assert soaked.grown((soak.THREADS, soak.HANDLES)) == [], soaked.lines()
