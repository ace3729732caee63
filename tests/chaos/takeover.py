"""A planned failover while nothing else is broken: how soon producers and each worker use the new master."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from tests.chaos.audit import is_quiet
from tests.chaos.outage import MAX_RESUME_S, QUIET_S, resumes_s
from tests.chaos.people import submit
from tests.chaos.plant import Plant
from tests.chaos.workload import Plan, Ticket, TicketOffice
from tests.servers import eventually

#: Handed in before the failover, and again right after it.
NUM_JOBS: Final = 40


@dataclass(slots=True)
class Takeover:
    """What a failover did; seconds since the name moved. `read_only_s`: how long it led to the read-only server."""

    read_only_s: float
    accepted_s: float = 0.0
    resumes_s: list[float] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def misses(self) -> list[str]:
        """Figures beyond their limits."""
        last = max(self.resumes_s, default=0.0)
        return [
            *([f"a submit was accepted {self.accepted_s:.1f} s after a failover"] if self.is_late else []),
            *([f"a worker resumed {last:.1f} s after a failover"] if last > MAX_RESUME_S else []),
        ]

    @property
    def is_late(self) -> bool:
        """Whether producers had to wait too long."""
        return self.accepted_s > MAX_RESUME_S

    def line(self) -> str:
        """One row of the table."""
        return (
            f"read-only for {self.read_only_s:.0f} s, then the name moved: a submit accepted after "
            f"{self.accepted_s:.2f} s, {len(self.resumes_s)} workers resumed within "
            f"{max(self.resumes_s, default=0.0):.1f} s"
        )


def live_through_failover(system: Plant, office: TicketOffice, read_only_s: float) -> Takeover:
    """Fail over while jobs run and wait; return when all of them are final."""
    takeover = Takeover(read_only_s, tickets=[office.ticket(Plan.PLAIN) for _ in range(2 * NUM_JOBS)])
    system.pair_up()
    with system.client() as client:
        for ticket in takeover.tickets[:NUM_JOBS]:
            submit(client, ticket)
        moved_at = system.fail_over(read_only_s)
        for number, ticket in enumerate(takeover.tickets[NUM_JOBS:]):
            submit(client, ticket)
            if number == 0:
                takeover.accepted_s = time.time() - moved_at
    with system.redis.client() as direct:
        job_ids = [ticket.job_id for ticket in takeover.tickets]
        eventually(lambda: is_quiet(direct, job_ids), QUIET_S, "all jobs of the failover are final")
        takeover.resumes_s = resumes_s(direct, job_ids, moved_at)
    return takeover
