"""A thread's loop that sweeps the ledger and rings the doorbells that a sweep asks for.

Runs in every worker and in the gateway; no leader is needed, because every step of a sweep is atomic. Knows no broker:
`ring` is handed in.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Final

import redis

from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Bell

logger = logging.getLogger(__name__)

#: Sweeps of many processes drift apart by this share of the interval.
JITTER: Final = 0.2


class Reaper:
    """`ring` sends the doorbell of a job; it may raise, the ledger then asks for the same bell again after a grace."""

    def __init__(self, ledger: Ledger, ring: Callable[[Bell], None], sweep_s: float) -> None:
        self._ledger, self._ring, self._sweep_s = ledger, ring, sweep_s

    def run(self, stop: threading.Event) -> None:
        """Sweep every `sweep_s` seconds until `stop`. An absent Redis or broker is logged and waited for."""
        while not stop.is_set():
            self.sweep()
            stop.wait(self._sweep_s * random.uniform(1 - JITTER, 1 + JITTER))

    def sweep(self) -> int:
        """Sweep once; return how many doorbells were rung."""
        try:
            bells = self._ledger.reap()
        except redis.RedisError as error:
            logger.warning("sweep failed", extra={"action": "reap", "error": type(error).__name__})
            return 0
        return sum(self._rings(bell) for bell in bells)

    def _rings(self, bell: Bell) -> bool:
        facts = {"action": "ring", "job_id": bell.job_id, "model": bell.model}
        try:
            self._ring(bell)
        except Exception as error:  # noqa: BLE001 - the broker's library decides what an absent broker raises
            logger.warning("doorbell failed", extra=facts | {"error": type(error).__name__})
            return False
        logger.info("doorbell rung", extra=facts)
        return True
