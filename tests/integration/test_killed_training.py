"""A training run that is killed three times leaves the weights of one that never was, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import S3Server

ROOT = Path(__file__).parents[2]


def both_runs(directory: Path, *options: str, endpoint: str = "") -> dict[str, object]:
    """Run the script and return what it prints."""
    environment = os.environ | {"AWS_ENDPOINT_URL_S3": endpoint, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.killed_training", str(directory), *options],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, object] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_a_run_killed_three_times_leaves_equal_weights_in_s3(tmp_path: Path, s3_server: S3Server) -> None:
    report = both_runs(tmp_path, endpoint=s3_server.url)
    assert report["signals"] == [9, 9, 9, 0]
    # From the base; from step 3; again, because step 6 was only half stored; from step 6, which its manifest shows.
    assert report["first_steps"] == [1, 4, 4, 7]
    assert report["killed"] == report["undisturbed"]


@pytest.mark.check
@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 1), (0, 2)])
def test_loader_threads_and_accumulation_change_nothing(tmp_path: Path, workers: int, accumulation: int) -> None:
    report = both_runs(tmp_path, "--workers", str(workers), "--accumulation", str(accumulation))
    assert report["first_steps"] == [1, 4, 4, 7]
    assert report["killed"] == report["undisturbed"]
