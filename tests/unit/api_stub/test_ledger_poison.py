"""One job that kills its workers, and the innocent ones that ran beside it. On a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode
from api_stub.contract.status import JobStatus
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Refusal, RefusalReason
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.broker_kit import Broker, leftovers
from tests.unit.api_stub.ledger_kit import lease_ends, lose, question, started

CONCURRENCY = 16


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    with closing(Ledger.connect(redis_url, LedgerConfig())) as ledger:
        yield Broker(ledger)


def pauses_end(client: redis.Redis) -> None:
    """Let every wait for a better moment be over."""
    for job_id in client.zrange(names.DUE_KEY, 0, -1):
        if client.hexists(names.job_key(job_id), "alarm"):
            client.hset(names.job_key(job_id), mapping={"alarm": "1", "not_before": "1"})
            client.zadd(names.DUE_KEY, {job_id: 1})


@dataclass
class Worker:
    """Takes all it can; dies as soon as it runs a killer, and comes back under another name."""

    broker: Broker
    num_deaths: int = 0
    running: list[Claim] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"worker-{self.num_deaths}"

    def fill(self) -> None:
        while len(self.running) < CONCURRENCY and (claim := self.broker.claim_next(self.name)) is not None:
            self.running.append(claim)

    def turn(self) -> None:
        """Work until something happens: a death, or one job done."""
        pauses_end(self.broker.redis)
        self.broker.ledger.reap()
        self.fill()
        if any(claim.job_id.startswith("killer") for claim in self.running):
            lease_ends(self.broker.redis, *(claim.job_id for claim in self.running))
            self.broker.ledger.reap()
            self.num_deaths += 1
            self.running = []
        elif self.running:
            self.broker.finish(self.running.pop())


def endings(broker: Broker) -> dict[str, JobStatus]:
    return {view.job_id: view.status for view in broker.ledger.list_jobs(limit=1000).jobs}


@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_killer_takes_no_innocent_job_with_it(broker: Broker, redis_client: redis.Redis, place: int) -> None:
    job_ids = [f"job-{i}" for i in range(15)]
    job_ids.insert(place, "killer")
    for job_id in job_ids:
        broker.submit(job_id, question())
    worker = Worker(broker)
    for _ in range(100):
        worker.turn()
    ends = endings(broker)
    assert ends.pop("killer") is JobStatus.FAILED
    assert set(ends.values()) == {JobStatus.COMPLETED}
    assert worker.num_deaths == 3
    [dead] = broker.ledger.dead()
    assert dead.job_id == "killer"
    assert dead.error is not None
    assert dead.error.code is ErrorCode.POISON_JOB
    broker.ledger.reap()
    assert leftovers(redis_client) == set()


def test_fresh_jobs_that_meet_the_killers_last_try_complete_too(broker: Broker) -> None:
    broker.submit("killer", question())
    worker = Worker(broker)
    for i in range(200):
        if i < 60:
            broker.submit(f"job-{i}", question())
        worker.turn()
    ends = endings(broker)
    assert ends.pop("killer") is JobStatus.FAILED
    assert set(ends.values()) == {JobStatus.COMPLETED}
    assert len(ends) == 60


def test_jobs_that_lost_one_worker_run_together_again(broker: Broker, redis_client: redis.Redis) -> None:
    for job_id in ("a", "b"):
        started(broker.ledger, job_id)
    lease_ends(redis_client, "a", "b")
    broker.ledger.reap()
    assert isinstance(broker.ledger.claim("a", "worker-2"), Claim)
    assert isinstance(broker.ledger.claim("b", "worker-2"), Claim)


def test_a_job_on_its_last_life_waits_for_a_worker_without_other_losers(
    broker: Broker, redis_client: redis.Redis
) -> None:
    ledger = broker.ledger
    for job_id in ("a", "b"):
        ledger.submit(job_id, question())
        for _ in range(2):
            assert isinstance(ledger.claim(job_id, "worker-1"), Claim)
            lose(ledger, redis_client, job_id)
    ledger.submit("fresh", question())
    first = ledger.claim("a", "worker-2")
    assert isinstance(first, Claim)
    assert isinstance(ledger.claim("fresh", "worker-2"), Claim)
    assert ledger.claim("b", "worker-2") == Refusal(RefusalReason.APART)
    assert ledger.claim("b", "worker-3") == Refusal(RefusalReason.BUSY)  # it waits a moment
    pauses_end(redis_client)
    assert [bell.job_id for bell in ledger.reap()] == ["b"]
    assert isinstance(ledger.claim("b", "worker-3"), Claim)
    broker.finish(first)
    assert not redis_client.exists(names.suspects_key("worker-2"))
