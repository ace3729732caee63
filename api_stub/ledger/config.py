"""The ledger's time and count limits, handed over by the settings of either side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: What workers and gateways should agree on: each treats a job by its own values.
SHARED_SETTINGS: Final = (
    "max_attempts",
    "tenant_max_running",
    "grace_s",
    "ageing_s",
    "result_ttl_s",
    "events_ttl_s",
    "unserved_ttl_s",
)


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """Durations in seconds of Redis' clock.

    lease_s: silence after which a claimed job counts as lost; the same for every process on one Redis. Time in which
        nobody reached Redis does not count: after such a gap a dead worker's job may be taken one lease later. A worker
        that starts when all others are dead sees such a gap, too.
    grace_s: time after which a queued job is checked for a lost doorbell.
    max_attempts: lost leases after which a job is given up (`poison_job`).
    tenant_max_running: jobs of one tenant and model that run or are about to; 0 means no limit. The workers' own
        setting decides.
    ageing_s: time in the queue after which a job of a lower priority is served among those of priority 0.
    window: doorbells of one priority list that are out at a time; more when there are many workers.
    unserved_ttl_s: time after which a queued job ends when no worker of its model has been there.
    max_queued: queued and in-progress jobs per model that submit admits; 0 means no limit.
    """

    lease_s: float = 15.0
    grace_s: float = 15.0
    max_attempts: int = 3
    max_queued: int = 0
    tenant_max_running: int = 0
    ageing_s: float = 60.0
    window: int = 8
    result_ttl_s: int = 86_400
    events_ttl_s: int = 3_600
    unserved_ttl_s: int = 86_400
