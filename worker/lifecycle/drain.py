"""The end of a worker on SIGTERM: claim nothing more, let running jobs finish for a while, give the rest back.

Celery on a thread pool waits for running tasks without a limit, so the limit is ours: after `drain_s` every attempt is
stopped and its job goes back to the queue, with no loss charged.
"""

from __future__ import annotations

import logging
import threading

from worker.lifecycle.attempt import Attempts, StopReason

logger = logging.getLogger(__name__)


class Drain:
    """The drain of one worker process. `begin()` may be called from a signal handler, more than once."""

    def __init__(self, attempts: Attempts, drain_s: float) -> None:
        self._attempts = attempts
        self._drain_s = drain_s
        self._begun = threading.Event()
        self._given_back = threading.Event()

    @property
    def is_draining(self) -> bool:
        """True from the first `begin()` on: no new job may be claimed."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Stop claiming and start the clock."""
        if self._begun.is_set():
            return
        self._begun.set()
        # Nothing more in a signal handler: what is interrupted may hold a lock that a log line needs.
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def _run(self) -> None:
        logger.info("draining", extra={"action": "drain", "num_running": len(self._attempts), "drain_s": self._drain_s})
        self._given_back.wait(self._drain_s)
        self.give_back()

    def give_back(self) -> None:
        """Wait no longer: what still runs goes back to the queue. Any thread, more than once."""
        self._attempts.close(StopReason.DRAINED)
        self._given_back.set()
