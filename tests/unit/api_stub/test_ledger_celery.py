"""What a plain Celery consumer sees of a job that the ledger ended: states, values, exceptions, and being woken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult

import api_stub.errors
from api_stub.contract import names
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.lua import Transition, script
from api_stub.ledger.settings import LedgerConfig
from tests.servers import eventually
from tests.unit.api_stub.ledger_kit import answer, failure, lose, question, started


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with closing(Ledger.connect(redis_url, LedgerConfig(max_attempts=1))) as opened:
        yield opened


@pytest.fixture
def celery_app(redis_url: str) -> Iterator[Celery]:
    """A consumer's application: it knows the result backend and nothing of ours."""
    app = Celery("consumer", broker=redis_url, backend=redis_url, set_as_current=False)
    yield app
    app.close()


def outcome(app: Celery, job_id: str) -> AsyncResult:
    return AsyncResult(job_id, app=app)


def raised(app: Celery, job_id: str) -> api_stub.errors.JobFailed:
    with pytest.raises(api_stub.errors.JobFailed) as failed:
        outcome(app, job_id).get(timeout=10)
    return failed.value


def test_completed_job_is_a_success_with_the_whole_result(ledger: Ledger, celery_app: Celery) -> None:
    claim = started(ledger, "a", metadata={"page": [1, "ü", None]})
    assert outcome(celery_app, "a").state == "PENDING"
    body = answer(claim, 'r"é😀')
    ledger.finish("a", claim.fence, body)
    result = outcome(celery_app, "a")
    assert result.state == "SUCCESS"
    assert result.get(timeout=10) == body.result.model_dump(mode="json", exclude_none=True)
    assert result.children == []
    assert result.traceback is None
    assert abs(result.date_done - datetime.now(UTC)) < timedelta(minutes=5)


def test_failed_job_raises_job_failed(ledger: Ledger, celery_app: Celery) -> None:
    claim = started(ledger, "a")
    ledger.finish("a", claim.fence, failure('bröken "thing"'))
    assert outcome(celery_app, "a").state == "FAILURE"
    error = raised(celery_app, "a")
    assert (error.code, error.message, error.retryable) == ("internal", 'bröken "thing"', True)


def test_jobs_that_no_worker_ended_raise_job_failed_too(
    ledger: Ledger, celery_app: Celery, redis_client: redis.Redis
) -> None:
    ledger.submit("cancelled", question())
    ledger.cancel("cancelled")
    ledger.submit("expired", question(deadline_s=60))
    redis_client.hset(names.job_key("expired"), "deadline", "1")
    ledger.claim("expired", "worker-1")
    started(ledger, "poison")
    lose(ledger, redis_client, "poison")
    states = {job_id: outcome(celery_app, job_id).state for job_id in ("cancelled", "expired", "poison")}
    assert states == {"cancelled": "REVOKED", "expired": "FAILURE", "poison": "FAILURE"}
    assert raised(celery_app, "cancelled").code == "cancelled"
    assert (raised(celery_app, "expired").code, raised(celery_app, "expired").retryable) == ("expired", True)
    assert (raised(celery_app, "poison").code, raised(celery_app, "poison").retryable) == ("poison_job", False)


@pytest.mark.parametrize("ending", ["completed", "cancelled"])
def test_waiting_consumer_is_woken_by_the_ending(
    ledger: Ledger, celery_app: Celery, redis_client: redis.Redis, ending: str
) -> None:
    claim = started(ledger, "a")
    answers: list[object] = []

    def wait() -> None:
        answers.append(outcome(celery_app, "a").get(timeout=20, propagate=False))

    waiter = threading.Thread(target=wait)
    waiter.start()
    channel = names.result_key("a")
    eventually(lambda: dict(redis_client.pubsub_numsub(channel))[channel], what="the consumer subscribes")
    if ending == "completed":
        ledger.finish("a", claim.fence, answer(claim))
    else:
        ledger.cancel("a")
        lose(ledger, redis_client, "a")
    waiter.join(20)
    assert not waiter.is_alive()
    [value] = answers
    assert isinstance(value, dict if ending == "completed" else api_stub.errors.JobFailed)


@pytest.mark.parametrize(
    ("seconds", "day"),
    [
        (0, "1970-01-01T00:00:00"),
        (951_782_400, "2000-02-29T00:00:00"),
        (1_709_251_199, "2024-02-29T23:59:59"),
        (1_735_689_599, "2024-12-31T23:59:59"),
        (4_107_542_400, "2100-03-01T00:00:00"),
    ],
)
def test_dates_are_right_in_leap_years(redis_client: redis.Redis, seconds: int, day: str) -> None:
    text = script(Transition.FINISH, LedgerConfig()).replace("redis.call('TIME')", f"{{'{seconds}', '7'}}")
    head, _, _ = text.partition("-- in_progress -> final")
    assert redis_client.eval(head + "return iso8601()", 0) == f"{day}.000007+00:00"
