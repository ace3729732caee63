"""A thread's loop that sweeps the ledger.

Runs in every worker and in the gateway. No leader is needed, because every step of a sweep is atomic: whoever comes
first sweeps for all, and when it dies the next one does.
"""

from __future__ import annotations

import logging
import random
import threading
from typing import Final

import redis

from api_stub.ledger.ledger import Ledger

logger = logging.getLogger(__name__)

#: Sweeps of many processes drift apart by this share of the interval.
JITTER: Final = 0.2
#: For this share of the interval one process' sweep counts for all.
PAUSE: Final = 0.75


class Reaper:
    """Sweeps every `sweep_s` seconds."""

    def __init__(self, ledger: Ledger, sweep_s: float) -> None:
        self._ledger, self._sweep_s = ledger, sweep_s

    def run(self, stop: threading.Event) -> None:
        """Sweep until `stop`. An absent Redis is logged and waited for."""
        while not stop.is_set():
            self.sweep()
            stop.wait(self._sweep_s * random.uniform(1 - JITTER, 1 + JITTER))

    def sweep(self) -> int:
        """Sweep once; return how many doorbells were rung."""
        try:
            bells = self._ledger.reap(PAUSE * self._sweep_s)
        except redis.RedisError as error:
            logger.warning("sweep failed", extra={"action": "reap", "error": type(error).__name__})
            return 0
        except Exception:  # what somebody wrote into a row; without this thread lost jobs would stay lost
            logger.exception("sweep failed unexpectedly", extra={"action": "reap"})
            return 0
        for bell in bells:
            logger.info("doorbell rung", extra={"action": "ring", "job_id": bell.job_id, "model": bell.model})
        return len(bells)
