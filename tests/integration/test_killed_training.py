"""A training run that is killed three times leaves the weights of one that never was, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import S3Server

ROOT = Path(__file__).parents[2]
#: Where, with how many loader threads, how many forwards of a step, and what learns. One process makes them all: its
#: imports and its base take as long as a run.
RUNS = (
    "s3:2:2:full", "folder:0:1:full", "folder:2:1:full", "folder:0:2:full",
    "folder:2:2:lora", "folder:0:2:checkpointing",
)  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> dict[str, dict[str, Any]]:
    """What the script prints of each run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISIONQ_")} | {
        "AWS_ENDPOINT_URL_S3": s3_server.url, "AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_REGION": "us-east-1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "tests.killed_training", str(tmp_path_factory.mktemp("runs")), *RUNS],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=420, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()[-len(RUNS) :]
    return dict(zip(RUNS, map(json.loads, lines), strict=True))


def check(report: dict[str, Any]) -> None:
    assert report["signals"] == [9, 9, 9, 0]
    # From the base; from step 3; again, because step 6 was only half stored; from step 6, which its manifest shows.
    assert report["first_steps"] == [1, 4, 4, 7]
    assert report["killed"] == report["undisturbed"]


def test_a_run_killed_three_times_leaves_equal_weights_in_s3(reports: dict[str, dict[str, Any]]) -> None:
    check(reports["s3:2:2:full"])


@pytest.mark.check
@pytest.mark.parametrize("run", RUNS[1:])
def test_loader_threads_and_accumulation_change_nothing(reports: dict[str, dict[str, Any]], run: str) -> None:
    check(reports[run])


@pytest.mark.check
def test_checkpointed_activations_give_the_weights_of_kept_ones(reports: dict[str, dict[str, Any]]) -> None:
    kept, again = (reports[run]["undisturbed"]["weights"] for run in RUNS[-2:])
    assert kept == again
