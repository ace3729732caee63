"""Doorbells that a worker took and will not answer: the ledger writes them again at once, for jobs that still wait."""

from __future__ import annotations

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.event import RetryReason
from api_stub.contract.job import TaskName
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Refusal
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import (
    answer,
    claimed,
    doorbells_in,
    lose_doorbells,
    question,
    ring_in,
    started,
)


@pytest.fixture
def bells(redis_client: redis.Redis, ledger: Ledger) -> redis.Redis:
    """Two waiting jobs, and a worker that has taken both doorbells."""
    for job_id in ("a", "b"):
        ledger.submit(job_id, question(priority=3))
    lose_doorbells(redis_client)
    return redis_client


def test_the_doorbell_is_there_again_at_once_and_no_sweep_writes_another(bells: redis.Redis, ledger: Ledger) -> None:
    assert ledger.ring_again(["a"]) == 1
    assert doorbells_in(bells) == ["a"]
    assert bells.llen(names.queue_list("default", 3)) == 1, "where its priority belongs"
    assert ledger.reap() == ()
    claimed(ledger, "a")
    assert bells.zscore(names.waiting_key(names.list_id("default", 3)), "a") is None


def test_it_stands_behind_those_that_wait(bells: redis.Redis, ledger: Ledger) -> None:
    ledger.submit("c", question(priority=3))
    assert ledger.ring_again(["a", "b"]) == 2
    assert doorbells_in(bells) == ["c", "a", "b"]


def test_a_job_that_is_claimed_final_or_unknown_needs_none(bells: redis.Redis, ledger: Ledger) -> None:
    claim = claimed(ledger, "a")
    assert ledger.ring_again(["a", "nobody"]) == 0
    ledger.finish("a", claim.fence, answer(claim))
    ledger.cancel("b")
    assert ledger.ring_again(["a", "b"]) == 0
    assert doorbells_in(bells) == []


def test_a_job_that_waits_out_a_delay_is_not_rung_early(redis_client: redis.Redis, ledger: Ledger) -> None:
    claim = started(ledger, "a")
    lose_doorbells(redis_client)
    ledger.give_back("a", claim.fence, RetryReason.STORAGE, 60.0)
    assert ledger.ring_again(["a"]) == 0
    assert doorbells_in(redis_client) == []


def test_a_held_job_keeps_its_place_in_the_line(redis_client: redis.Redis, redis_url: str) -> None:
    ledger = Ledger.connect(redis_url, LedgerConfig(tenant_max_running=1))
    ledger.submit("a", question(tenant="zoo"))
    ledger.submit("b", question(tenant="zoo"))
    assert ledger.ring_again(["b"]) == 0
    assert doorbells_in(redis_client) == ["a"]
    ledger.close()


def test_a_job_adopted_from_a_plain_message_has_no_doorbell_to_write_again(
    redis_client: redis.Redis, ledger: Ledger
) -> None:
    ledger.adopt("a", task=TaskName.VQA, model="default", job=question(), priority=6)
    assert ledger.ring_again(["a"]) == 0
    assert doorbells_in(redis_client) == []


def test_a_suspect_is_rung_once(bells: redis.Redis, ledger: Ledger) -> None:
    ledger.reap()
    assert bells.hexists(names.job_key("a"), "alarm"), "its doorbell is missed"
    assert ledger.ring_again(["a"]) == 1
    assert not bells.hexists(names.job_key("a"), "alarm")
    assert doorbells_in(bells) == ["a"]


def test_two_doorbells_of_one_job_are_one_attempt(bells: redis.Redis, ledger: Ledger) -> None:
    assert ledger.ring_again(["a", "a"]) == 2
    claimed(ledger, "a")
    assert isinstance(ledger.claim("a", "worker-2"), Refusal)


def test_a_doorbell_that_is_lost_after_all_is_found_by_a_sweep(bells: redis.Redis, ledger: Ledger) -> None:
    """One of later doorbells was served, so it must have been taken by somebody."""
    ledger.ring_again(["a"])
    lose_doorbells(bells)
    ledger.submit("c", question(priority=3))
    claimed(ledger, "c")
    ring_in(bells, priority=3)
    ledger.reap()
    assert bells.hexists(names.job_key("a"), "alarm")
