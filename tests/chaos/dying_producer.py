"""A producer that dies with its last submit: `python -m tests.chaos.dying_producer REDIS_URL LEASE_S < jobs`.

Standard input: `{job id: job, …}`. All jobs but the last are handed in as always; the last one's reply is not read.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from api_stub.contract.job import parse_job
from api_stub.ledger import calls
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import script
from api_stub.ledger.settings import LedgerConfig
from api_stub.submit import submit


def main() -> None:
    """Hand in the jobs until death."""
    redis_url, lease_s = sys.argv[1], float(sys.argv[2])
    jobs = json.load(sys.stdin)
    config = LedgerConfig(lease_s=lease_s)
    ledger = Ledger.connect(redis_url, config)
    *others, last = jobs
    for job_id in others:
        submit(ledger, job_id, parse_job(jobs[job_id]))
    call = calls.submit(last, parse_job(jobs[last]))
    connection = ledger.client.connection_pool.get_connection()
    connection.send_command("EVAL", script(call.transition, config), 0, *call.args)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
