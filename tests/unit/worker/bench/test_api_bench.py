"""`visionq-worker bench api` runs against a real gateway and tells what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.check


def test_the_bench_of_the_gateway_measures_all_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "api.json"
    command = [sys.executable, "-P", "-m", "worker.cli", "bench", "api"]
    sizes = ["--jobs", "3", "--events", "60", "--readers", "10", "--json", str(file)]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for row in ("submit, client", "submit, HTTP", "events/s, client", "events/s, HTTP", "10 idle readers"):
        assert row in done.stdout
    report = json.loads(file.read_text("utf-8"))
    assert len(report["client_submit_s"]) == len(report["http_submit_s"]) == 3
    assert min(report["client_events_per_s"] + report["http_events_per_s"]) > 0
    assert report["rss_idle_bytes"] >= report["rss_before_bytes"] > 2**20
