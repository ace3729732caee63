"""From a message to a claim, against a real ledger."""

from __future__ import annotations

import json
import uuid

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.job import TaskName, VqaJob, parse_job
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from worker.jobs.claim import Claimer
from worker.jobs.entry import DropReason, Unreadable
from worker.jobs.message import JobMessage


@pytest.fixture
def ledger(redis_url: str) -> Ledger:
    return Ledger.connect(redis_url, LedgerConfig())


@pytest.fixture
def claimer(ledger: Ledger) -> Claimer:
    return Claimer(ledger, worker="worker-1", model="default")


def message(fields: dict[str, object] | None, job_id: str | None = None, problem: str | None = None) -> JobMessage:
    return JobMessage(job_id or str(uuid.uuid4()), TaskName.VQA, priority=3, fields=fields, problem=problem)


def test_a_doorbell_claims_the_job_that_the_ledger_has(claimer: Claimer, ledger: Ledger) -> None:
    job_id = str(uuid.uuid4())
    ledger.submit(job_id, VqaJob(question="hello").resolved(job_id))
    claimed = claimer.claim(message(None, job_id))
    assert claimed is not None
    assert claimed.problem is None
    assert parse_job(claimed.claim.body).question == "hello"
    assert claimer.claim(message(None, job_id)) is None, "a second doorbell finds the job taken"


def test_a_doorbell_for_an_unknown_id_is_dropped(claimer: Claimer) -> None:
    assert claimer.claim(message(None)) is None


def test_a_plain_message_is_adopted_with_the_queue_s_model_and_the_message_s_priority(
    claimer: Claimer, ledger: Ledger
) -> None:
    claimed = claimer.claim(message({"question": "hello"}))
    assert claimed is not None
    job = parse_job(claimed.claim.body)
    assert (job.model, job.priority, job.sampling.max_new_tokens) == ("default", 3, 256)
    assert job.sampling.seed is not None
    view = ledger.view(claimed.claim.job_id)
    assert view is not None
    assert view.status == "in_progress"


def test_the_same_plain_message_twice_is_one_job_and_another_body_is_dropped(claimer: Claimer, ledger: Ledger) -> None:
    first = claimer.claim(message({"question": "hello"}))
    assert first is not None
    job_id = first.claim.job_id
    assert claimer.claim(message({"question": "hello"}, job_id)) is None
    with pytest.raises(Unreadable) as raised:
        claimer.claim(message({"question": "other"}, job_id))
    assert raised.value.reason is DropReason.ID_TAKEN
    view = ledger.view(job_id)
    assert view is not None
    assert view.attempt == 1


@pytest.mark.parametrize(
    ("fields", "problem", "said"),
    [
        ({"question": "hello", "colour": "red"}, None, "colour"),
        ({}, "send keyword arguments", "keyword"),
        ({"question": "x" * 300_000}, None, "262144"),
        ({"question": "hello", "metadata": {"a": float("nan")}}, None, "metadata"),
        ({"question": "hello", "metadata": json.loads('{"a":' * 700 + "1" + "}" * 700)}, None, "metadata"),
        ({"question": "hello", "metadata": json.loads('{"a":' * 150 + "1" + "}" * 150)}, None, "limit is 128"),
    ],
)
def test_a_plain_message_that_is_no_job_is_claimed_with_its_problem(
    fields: dict[str, object], problem: str | None, said: str, claimer: Claimer
) -> None:
    claimed = claimer.claim(message(fields, problem=problem))
    assert claimed is not None
    assert claimed.claim.body == ""
    assert claimed.problem is not None
    assert said in claimed.problem


def test_a_lasting_fault_of_redis_is_raised_at_once(
    claimer: Claimer, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis_client.set(names.job_key("spoilt"), "no job")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        claimer.claim(message(None, "spoilt"))
    assert [record.getMessage() for record in caplog.records] == []


def test_a_redis_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("worker.jobs.claim.PAUSES_S", (0.01, 0.01))
    ledger = Ledger.connect("redis://127.0.0.1:1/0", LedgerConfig())
    claimer = Claimer(ledger, worker="worker-1", model="default")
    with pytest.raises(redis.ConnectionError):
        claimer.claim(message(None))
    assert [record.getMessage() for record in caplog.records] == ["ledger does not answer"] * 2
