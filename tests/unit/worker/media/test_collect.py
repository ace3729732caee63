"""Directories of jobs: gone after the job, and after the worker that was killed in the middle of one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from worker.media.collect import job_directory, remove_leftovers


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def broken_job() -> None:
    with job_directory() as directory:
        (directory / "file").write_bytes(b"x")
        raise ValueError("broken")


def test_a_directory_goes_with_its_job_also_when_that_fails(temporary: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        broken_job()
    assert list(temporary.iterdir()) == []


def test_what_a_dead_process_left_is_removed_and_nothing_else(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait(20)
    leftover = temporary / f"visionq-media-{gone.pid}-abc"
    others = [temporary / f"visionq-media-{os.getppid()}-abc", temporary / "visionq-media-x", temporary / "other"]
    for directory in (leftover, *others):
        directory.mkdir()
        (directory / "media-1").write_bytes(b"x")
    assert remove_leftovers() == 1
    assert sorted(temporary.iterdir()) == sorted(others)
