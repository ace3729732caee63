"""What the Celery result backend holds for each end of a job, as the ledger writes it and Celery reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult

from api_stub.contract import names
from api_stub.contract.event import CompletedBody, FailedBody
from api_stub.contract.job import VqaJob
from api_stub.errors import JobFailed
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.golden.samples import FAILURE, JOB_ID, RESULT

DIRECTORY = Path(__file__).parent / "celery"
DATE = "2026-09-21T14:13:20.250000+00:00"
JOB = VqaJob(question="What colour is the circle?")


def completed(ledger: Ledger) -> None:
    ledger.finish(JOB_ID, _claimed(ledger).fence, CompletedBody(result=RESULT))


def failed(ledger: Ledger) -> None:
    ledger.finish(JOB_ID, _claimed(ledger).fence, FailedBody(error=FAILURE, partial_text="The"))


def cancelled(ledger: Ledger) -> None:
    ledger.cancel(JOB_ID)


def _claimed(ledger: Ledger) -> Claim:
    claim = ledger.claim(JOB_ID, "w1@host:17")
    assert isinstance(claim, Claim)
    return claim


ENDS: dict[str, Callable[[Ledger], None]] = {"success": completed, "failure": failed, "revoked": cancelled}


@pytest.fixture
def ledger(redis_client: redis.Redis) -> Ledger:
    opened = Ledger(redis_client, LedgerConfig())
    opened.submit(JOB_ID, JOB)
    return opened


@pytest.mark.parametrize("name", ENDS)
def test_the_stored_meta_is_the_agreed_json(name: str, ledger: Ledger, redis_client: redis.Redis) -> None:
    ENDS[name](ledger)
    meta = json.loads(redis_client.get(names.result_key(JOB_ID)) or "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", meta["date_done"])
    assert meta | {"date_done": DATE} == json.loads((DIRECTORY / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ENDS)
def test_celery_still_reads_the_agreed_json(name: str, redis_url: str, redis_client: redis.Redis) -> None:
    redis_client.set(names.result_key(JOB_ID), (DIRECTORY / f"{name}.json").read_text("utf-8"))
    with Celery("consumer", backend=redis_url, set_as_current=False) as app:
        result = AsyncResult(JOB_ID, app=app)
        assert result.state == name.upper()
        assert result.date_done.isoformat() == DATE
        if name == "success":
            assert result.get(timeout=5)["text"] == RESULT.text
            return
        with pytest.raises(JobFailed) as failure:
            result.get(timeout=5)
        expected = (FAILURE.code, FAILURE.message, False) if name == "failure" else ("cancelled",)
        assert failure.value.args[: len(expected)] == expected
