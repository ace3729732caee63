"""A producer that dies between ledger and doorbell: `python -m tests.chaos.dying_producer REDIS_URL LEASE_S < jobs`.

Standard input: `{job id: job, …}`. All jobs but the last are handed in as always; the last one's doorbell is death.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from api_stub.contract.job import parse_job
from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Bell
from api_stub.submit import Doorbells, submit


class LastDoorbells(Doorbells):
    """Kills its process instead of ringing for one job."""

    def __init__(self, redis_url: str, last: str) -> None:
        super().__init__(redis_url)
        self._last = last

    def ring(self, bell: Bell) -> None:
        if bell.job_id == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        super().ring(bell)


def main() -> None:
    """Hand in the jobs until death."""
    redis_url, lease_s = sys.argv[1], float(sys.argv[2])
    jobs = json.load(sys.stdin)
    ledger = Ledger.connect(redis_url, LedgerConfig(lease_s=lease_s))
    doorbells = LastDoorbells(redis_url, list(jobs)[-1])
    for job_id, fields in jobs.items():
        submit(ledger, doorbells, job_id, parse_job(fields))
    os.kill(os.getpid(), signal.SIGKILL)  # no doorbell was due: the ledger holds it back


if __name__ == "__main__":
    main()
