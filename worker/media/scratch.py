"""Directories for the files of a job under way, and the removal of those that a killed worker left behind."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"visionq-media-(?P<pid>\d+)-.*")


@contextmanager
def job_directory() -> Iterator[Path]:
    """Give a fresh directory, and remove it with all that is in it. Its name tells which process it belongs to."""
    with tempfile.TemporaryDirectory(prefix=f"visionq-media-{os.getpid()}-") as directory:
        yield Path(directory)


def remove_leftovers() -> int:
    """Remove the directories of processes that are gone; return how many there were. Call it before the first job."""
    leftovers = [path for path in Path(tempfile.gettempdir()).iterdir() if _is_leftover(path)]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return len(leftovers)


def _is_leftover(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    if name is None:
        return False
    pid = int(name["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return pid == os.getpid()  # before the first job, a directory of this number is an earlier process's
