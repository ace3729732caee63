"""Signals that ask to stop, turned into a question that the main thread's waits put between two steps.

An exception out of a signal handler could hit between the start of a child and the note of its id; a flag cannot.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from api_stub.errors import VisionqError

POLL_S = 0.05
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(VisionqError):
    """Raised when a wait is given up because a signal asked to stop. `signum` tells which."""

    code = "interrupted"

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted instead of ending the process. Main thread only."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in _STOPPING:
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.requested = signum

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Poll until `condition()` holds; return False after `timeout_s`. Raises Interrupted when a signal has come."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def pause(self, seconds: float) -> None:
        """Let time pass. Raises Interrupted as soon as a signal has come."""
        self.wait_for(lambda: False, seconds)


def exit_status(command: Callable[[], None]) -> int:
    """Run a command and return its exit status: 0, 1 with a line on stderr, or 128 and the signal that stopped it."""
    try:
        command()
    except Interrupted as interrupted:
        sys.stderr.write(f"{interrupted}\n")
        return 128 + interrupted.signum
    except (VisionqError, TimeoutError) as error:
        sys.stderr.write(f"{getattr(error, 'code', 'timeout')}: {error}\n")
        return 1
    return 0
