"""The end of a worker on SIGTERM: no more claims, `drain_s` for running jobs to finish, and the rest given back.

Given back at no cost for the jobs. Celery on a thread pool would wait for running tasks without a limit.
"""

from __future__ import annotations

import logging
import threading

from worker.jobs.attempt import Attempts, StopReason

logger = logging.getLogger(__name__)


class Drain:
    """The drain of one worker process: no more claims, and `drain_s` for running jobs to finish."""

    def __init__(self, attempts: Attempts, drain_s: float) -> None:
        self._attempts = attempts
        self._drain_s = drain_s
        self._begun = threading.Event()
        self._given_back = threading.Event()

    @property
    def is_draining(self) -> bool:
        """Whether `begin` was called: no new job may be claimed."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Start the drain. May be called from a signal handler, and more than once."""
        if self._begun.is_set():
            return
        self._begun.set()
        # No logging in a signal handler: the interrupted code may hold the log's lock.
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def _run(self) -> None:
        logger.info("draining", extra={"action": "drain", "num_running": len(self._attempts), "drain_s": self._drain_s})
        self._given_back.wait(self._drain_s)
        self.give_back()

    def give_back(self) -> None:
        """End the drain now: jobs that still run go back to the queue. Any thread, more than once."""
        self._attempts.close(StopReason.DRAINED)
        self._given_back.set()
