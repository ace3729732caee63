"""What a worker of the last release left in Redis is read truthfully, and what it left undone is done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api_stub.client.client import Client
from api_stub.contract.status import JobStatus
from api_stub.errors import JobFailed
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from tests.compat.record import HOOK, RECORDED, restore
from tests.servers import eventually

CONTENT: dict[str, Any] = json.loads(RECORDED.read_text("utf-8"))
JOBS: dict[str, str] = CONTENT["jobs"]
CODES = {"failed": "prompt_too_long", "cancelled": "cancelled", "expired": "expired"}


@pytest.fixture
def client(ledger: Ledger, redis_url: str) -> Client:
    restore(ledger.client, CONTENT["keys"])
    return Client(redis_url)


def test_the_recording_is_small() -> None:
    assert RECORDED.stat().st_size < 100_000


def test_a_completed_job_has_its_result_and_its_whole_stream(client: Client) -> None:
    job = client.job(JOBS["completed"])
    result = job.result(timeout=10)
    assert result.text
    assert "".join(job.stream(timeout=10)) == result.text
    events = list(job.events(timeout=10))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [events[0].type, events[-1].type] == ["job.queued", "job.completed"]
    assert job.status().result == result


@pytest.mark.parametrize("what", CODES)
def test_a_job_that_ended_without_an_answer_says_why(what: str, client: Client) -> None:
    job = client.job(JOBS[what])
    with pytest.raises(JobFailed) as failure:
        job.result(timeout=10)
    assert failure.value.code == CODES[what]
    assert job.status().status is JobStatus(what)
    assert list(job.events(timeout=10))[-1].type == f"job.{what}"


def test_webhooks_of_final_jobs_wait_for_a_gateway(client: Client, ledger: Ledger) -> None:
    waiting = [
        ledger.client.hgetall(f"visionq:webhook:{name}") for name in ledger.client.zrange("visionq:webhooks", 0, -1)
    ]
    assert {row["job_id"] for row in waiting} == {JOBS[name] for name in ("completed", *CODES)}
    assert {row["url"] for row in waiting} == {HOOK["url"]}


def test_the_job_of_a_lost_worker_and_the_queued_one_are_rung_for_and_run(client: Client, ledger: Ledger) -> None:
    lost = client.job(JOBS["lost"])
    assert lost.status().status is JobStatus.IN_PROGRESS

    def is_queued() -> bool:
        ledger.reap()
        return lost.status().status is JobStatus.QUEUED

    eventually(is_queued, 60, "the lost job is rung for")
    for name, attempt in (("lost", 2), ("queued", 1)):
        claim = ledger.claim(JOBS[name], "worker-1")
        assert isinstance(claim, Claim)
        assert claim.attempt == attempt
