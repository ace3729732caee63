"""Redis is gone for half a minute: what producers are told meanwhile, and how soon each worker serves again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import redis

from api_stub.client.client import Client
from api_stub.contract.event import JobStarted
from api_stub.errors import StoreUnavailable
from tests.chaos.audit import events_of, is_quiet
from tests.chaos.people import submit
from tests.chaos.plant import Plant
from tests.chaos.workload import Plan, Ticket, TicketOffice
from tests.servers import eventually

#: Enough that every worker runs some and some wait when Redis goes.
NUM_JOBS: Final = 60
MAX_REFUSAL_S: Final = 5.0
MAX_RESUME_S: Final = 10.0
QUIET_S: Final = 120.0


@dataclass(slots=True)
class Outage:
    """What an outage of `seconds` did. `resumes_s`: from Redis' return to each worker's next start of a job."""

    seconds: float
    refusals_s: list[float] = field(default_factory=list)
    resumes_s: list[float] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def misses(self) -> list[str]:
        """Figures beyond their limits."""
        slowest, last = max(self.refusals_s, default=0.0), max(self.resumes_s, default=0.0)
        return [
            *([f"a submit failed only after {slowest:.1f} s of outage"] if slowest > MAX_REFUSAL_S else []),
            *([f"a worker resumed {last:.1f} s after an outage"] if last > MAX_RESUME_S else []),
        ]

    def line(self) -> str:
        """One row of the table."""
        return (
            f"{self.seconds:.0f} s without Redis: {len(self.refusals_s)} submits refused within "
            f"{max(self.refusals_s, default=0.0):.2f} s, {len(self.resumes_s)} workers resumed within "
            f"{max(self.resumes_s, default=0.0):.1f} s of its return"
        )


def live_through(system: Plant, office: TicketOffice, seconds: float) -> Outage:
    """Take Redis away while jobs run and wait; return when all of them are final."""
    outage = Outage(seconds, tickets=[office.ticket(Plan.PLAIN) for _ in range(NUM_JOBS)])
    with system.client() as client:
        for ticket in outage.tickets:
            submit(client, ticket)
        system.redis.kill()
        gone_at = time.monotonic()
        while time.monotonic() - gone_at < seconds:
            outage.refusals_s.append(_refusal_s(client, outage.tickets[0]))
            time.sleep(0.5)
        system.redis.start()
    returned_at = time.time()
    with system.redis.client() as direct:
        job_ids = [ticket.job_id for ticket in outage.tickets]
        eventually(lambda: is_quiet(direct, job_ids), QUIET_S, "all jobs of the outage are final")
        outage.resumes_s = resumes_s(direct, job_ids, returned_at)
    return outage


def _refusal_s(client: Client, ticket: Ticket) -> float:
    """Hand in a job once more while there is no Redis; return how long the refusal took."""
    began = time.monotonic()
    try:
        client.submit(ticket.fields, job_id=ticket.job_id)
    except StoreUnavailable:
        return time.monotonic() - began
    raise AssertionError("a submit succeeded without Redis")


def resumes_s(direct: redis.Redis, job_ids: Sequence[str], returned_at: float) -> list[float]:
    """Return how soon after a moment each worker began a job."""
    first: dict[str, float] = {}
    for job_id in job_ids:
        for event in events_of(direct, job_id):
            if isinstance(event, JobStarted) and event.ts > returned_at:
                first[event.worker] = min(event.ts, first.get(event.worker, event.ts))
    return [at - returned_at for at in first.values()]
