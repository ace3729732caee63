"""Which fault happens when, to whom and for how long: a schedule that follows from its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final


class Plane(StrEnum):
    """What a fault breaks. Faults of one plane never overlap, those of different planes may."""

    WORKER = "worker"
    NETWORK = "network"
    REDIS = "redis"
    BROKER = "broker"
    STORAGE = "storage"
    PRODUCER = "producer"


class FaultKind(StrEnum):
    """Everything that goes wrong."""

    SIGKILL = "worker SIGKILL"
    SIGTERM = "worker SIGTERM"
    SIGSTOP = "worker SIGSTOP, a zombie"
    RESET = "TCP reset"
    CUT_REQUESTS = "one-way cut, requests"
    CUT_REPLIES = "one-way cut, replies"
    SILENCE = "half-open silence"
    SLOW_NETWORK = "slow network"
    REDIS_KILL = "Redis SIGKILL, restart"
    REDIS_FULL = "Redis out of memory"
    REDIS_READ_ONLY = "Redis read-only"
    REDIS_NO_REPLICAS = "Redis short of replicas"
    FAILOVER = "planned failover"
    JUNK = "junk in the broker's lists"
    S3_ERRORS = "S3 errors 500"
    S3_SLOW = "S3 slow"
    S3_TRUNCATED = "S3 truncated bodies"
    S3_REFUSES_ONE = "S3 refuses one worker"
    PRODUCER_KILL = "producer SIGKILL"

    @property
    def plane(self) -> Plane:
        """What it breaks."""
        return _PLANES[self]


_PLANES: Final = (
    dict.fromkeys([FaultKind.SIGKILL, FaultKind.SIGTERM, FaultKind.SIGSTOP], Plane.WORKER)
    | dict.fromkeys(
        [
            FaultKind.RESET,
            FaultKind.CUT_REQUESTS,
            FaultKind.CUT_REPLIES,
            FaultKind.SILENCE,
            FaultKind.SLOW_NETWORK,
        ],
        Plane.NETWORK,
    )
    | dict.fromkeys(
        [
            FaultKind.REDIS_KILL,
            FaultKind.REDIS_FULL,
            FaultKind.REDIS_READ_ONLY,
            FaultKind.REDIS_NO_REPLICAS,
            FaultKind.FAILOVER,
        ],
        Plane.REDIS,
    )
    | {FaultKind.JUNK: Plane.BROKER}
    | dict.fromkeys(
        [FaultKind.S3_ERRORS, FaultKind.S3_SLOW, FaultKind.S3_TRUNCATED, FaultKind.S3_REFUSES_ONE], Plane.STORAGE
    )
    | {FaultKind.PRODUCER_KILL: Plane.PRODUCER}
)


@dataclass(frozen=True, slots=True)
class Fault:
    """`target` counts workers from 0; in the network plane the number after the last worker means the producers."""

    at_s: float
    kind: FaultKind
    target: int
    duration_s: float


def schedule(
    rng: Random, kinds: Sequence[FaultKind], *, seconds: float, every_s: float, num_workers: int, lease_s: float
) -> list[Fault]:
    """Return faults from `every_s` to `seconds`: every kind once, in random order, before any comes again."""
    faults: list[Fault] = []
    deck: list[FaultKind] = []
    at_s = every_s
    while at_s < seconds:
        if not deck:
            deck = rng.sample(kinds, len(kinds))
        kind = deck.pop()
        num_targets = num_workers + (kind.plane is Plane.NETWORK)
        faults.append(Fault(at_s, kind, rng.randrange(num_targets), _duration(rng, kind, lease_s)))
        at_s += every_s * rng.uniform(0.5, 1.5)
    return faults


def _duration(rng: Random, kind: FaultKind, lease_s: float) -> float:
    if kind is FaultKind.SIGSTOP:
        return lease_s + rng.uniform(1.0, 3.0)  # somebody else has its jobs when it wakes up
    if kind.plane is Plane.NETWORK:
        return rng.uniform(1.0, lease_s + 2.0)
    if kind.plane is Plane.REDIS:
        return rng.uniform(0.5, 3.5)
    if kind is FaultKind.S3_REFUSES_ONE:
        return rng.uniform(4.0, 12.0)  # long enough to fall sick, and to try a job in vain
    return rng.uniform(1.0, 4.0)
