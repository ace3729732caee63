"""Ends what a killed parent leaves behind: child processes, their directory, the file with the endpoints.

Run as a script with a pipe on stdin; each line is a JSON pair `[verb, value]`: `watch` and `forget` a process group,
`remove` a path. Acts when the pipe closes, which the system does even for a parent that died by SIGKILL.
Standard library only, so that it starts in a few milliseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

REMOVE_S = 5.0


def main(lines: Iterable[str]) -> None:
    """Follow the parent until it is gone, then clean up after it."""
    groups: dict[int, None] = {}
    paths: list[Path] = []
    for line in lines:
        verb, value = json.loads(line)
        if verb == "watch":
            groups[value] = None
        elif verb == "forget":
            groups.pop(value, None)
        elif verb == "remove":
            paths.append(Path(value))
    for group in reversed(groups):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + REMOVE_S
    # The killed may write for another moment, so one pass over a directory need not be enough.
    while any(not _removed(path) for path in paths) and time.monotonic() < deadline:
        time.sleep(0.05)


def _removed(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    main(sys.stdin)
