"""Which weights answered is told in `job.started` and in the result, unless a reader of 0.1.0 may be there."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.event import CompletedBody
from api_stub.contract.job import VqaJob
from api_stub.contract.result import FinishReason, Result, Timings, Usage
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.servers import RedisServer

BASE, ADAPTER = "ab" * 32, "cd" * 32
METADATA = {"n": 1, "checkpoint": "ef" * 32}


@pytest.fixture
def ledger(redis_server: RedisServer) -> Ledger:
    ledger = Ledger.connect(redis_server.url, LedgerConfig())
    ledger.client.flushdb()
    return ledger


def told(ledger: Ledger, model: str = "default", **fields: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a job; return its `job.started` and its result as the stream has them."""
    job_id = str(uuid.uuid4())
    ledger.submit(job_id, VqaJob(question="Why?", model=model, metadata=METADATA))
    if fields.get("v") == "":
        ledger.client.hdel(names.job_key(job_id), "v")
    claim = ledger.claim(job_id, "worker", None, BASE, {"red": ADAPTER})
    assert isinstance(claim, Claim)
    result = Result(
        job_id=job_id, task=claim.task or "visionq.vqa", model=model, text="because", finish_reason=FinishReason.STOP,
        usage=Usage(), timings=Timings(queued_s=0, fetch_s=0, prepare_s=0, generate_s=0, total_s=0), attempt=1,
        metadata=METADATA, checkpoint=BASE,
    )  # fmt: skip
    ledger.finish(job_id, claim.fence, CompletedBody(result=result))
    events = [json.loads(entry["event"]) for _, entry in ledger.client.xrange(names.events_key(job_id))]
    celery = json.loads(str(ledger.client.get(names.result_key(job_id))))["result"]
    started = next(event for event in events if event["type"] == "job.started")
    completed = next(event for event in events if event["type"] == "job.completed")["result"]
    assert completed == celery
    assert completed["metadata"] == METADATA
    return started, completed


def test_the_digests_are_told(ledger: Ledger) -> None:
    started, result = told(ledger)
    assert (started["checkpoint"], started.get("adapter"), result["checkpoint"]) == (BASE, None, BASE)
    started, _ = told(ledger, "default:red")
    assert (started["model"], started["adapter"], started["checkpoint"]) == ("default", "red", f"{BASE}+{ADAPTER}")
    started, _ = told(ledger, "default:blue")
    assert (started["adapter"], started.get("checkpoint")) == ("blue", None)


def test_nothing_is_told_beside_processes_of_the_first_release(ledger: Ledger) -> None:
    started, result = told(ledger, v="")
    assert "checkpoint" not in started | result
    seconds, _ = redis.Redis.time(ledger.client)
    ledger.client.hset(names.WATCH_KEY, "older", str(seconds))
    started, result = told(ledger, "default:red")
    assert "checkpoint" not in started | result
    assert "adapter" not in started
