"""What becomes of a job whose storage stays away: back to the ledger with growing pauses, a bounded number of times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import FailedBody, JobExpired, JobRetrying, RetryReason
from api_stub.contract.job import VqaJob
from api_stub.contract.result import Usage
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import claimed, event_types, events, lose, reap_until_bells
from worker.errors import (
    DecoderFailed,
    DiskFailed,
    GenerationFailed,
    MediaForbidden,
    MediaNotFound,
    MediaRefused,
    OutOfMemory,
    StorageRefuses,
    StorageUnavailable,
    Unforeseen,
    WorkerError,
)
from worker.jobs.outcome import (
    MAX_TRIES,
    STORAGE_RETRIES,
    GiveBack,
    as_worker_error,
    outcome_while_circuit_is_open,
    retried_or_failed,
)
from worker.streaming.output import AttemptOutput, AttemptStream

AWAY = StorageUnavailable("storage did not answer")


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with closing(Ledger.connect(redis_url, LedgerConfig())) as opened:
        yield opened


def ending(claim: Claim, error: WorkerError, max_retries: int = 5) -> FailedBody | GiveBack:
    output = AttemptOutput("request", AttemptStream(claim.job_id, claim.fence))
    return retried_or_failed(claim, error, output, Usage(), max_retries)


def attempt(ledger: Ledger, client: redis.Redis, max_retries: int) -> str:
    """One attempt that meets storage that is away; its pause is over at once. Return what became of the job."""
    claim = claimed(ledger, "a")
    body = ending(claim, AWAY, max_retries)
    if isinstance(body, FailedBody):
        return ledger.finish("a", claim.fence, body).value
    assert ledger.give_back("a", claim.fence, body.reason, body.pause_s, body.is_charged)
    client.hset(names.job_key("a"), mapping={"alarm": "1", "not_before": "1"})
    client.zadd(names.DUE_KEY, {"a": 1})
    assert [bell.job_id for bell in reap_until_bells(ledger)] == ["a"]
    return body.reason.value


def test_a_job_without_storage_is_put_back_a_bounded_number_of_times(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", VqaJob(question="hello"))
    assert [attempt(ledger, redis_client, 2) for _ in range(3)] == ["storage", "storage", "done"]
    reasons = [event.reason for event in events(redis_client, "a") if isinstance(event, JobRetrying)]
    assert reasons == [RetryReason.STORAGE] * 2
    view = ledger.view("a")
    assert view is not None
    assert view.error == AWAY.info()
    assert redis_client.hget(names.job_key("a"), "losses") == "0"


def test_lost_workers_do_not_use_up_the_retries(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", VqaJob(question="hello"))
    assert attempt(ledger, redis_client, 2) == "storage"
    claimed(ledger, "a")
    lose(ledger, redis_client, "a")
    assert claimed(ledger, "a").num_retries == 1


def test_permanent_faults_fail_at_once(ledger: Ledger) -> None:
    ledger.submit("a", VqaJob(question="hello"))
    claim = claimed(ledger, "a")
    prompt = GenerationFailed(ErrorInfo.of(ErrorCode.PROMPT_TOO_LONG, "no"))
    for error in (MediaNotFound("no"), MediaForbidden("no"), prompt):
        assert isinstance(ending(claim, error), FailedBody)
    assert isinstance(ending(claim, AWAY, 0), FailedBody)


BROKEN = GenerationFailed(ErrorInfo.of(ErrorCode.INTERNAL, "the step failed"))


@pytest.mark.parametrize(
    "error", [MediaRefused("no"), DecoderFailed("no"), BROKEN, Unforeseen("no"), OutOfMemory("no")], ids=repr
)
def test_what_may_be_the_workers_fault_is_tried_again_a_bounded_number_of_times(
    ledger: Ledger, error: WorkerError
) -> None:
    ledger.submit("a", VqaJob(question="hello"))
    for num_retries in range(MAX_TRIES - 1):
        claim = claimed(ledger, "a")
        assert claim.num_retries == num_retries
        body = ending(claim, error)
        assert isinstance(body, GiveBack)
        assert ledger.give_back("a", claim.fence, body.reason, 0.0, body.is_charged)
        ledger.reap()
    final = ending(claimed(ledger, "a"), error)
    assert isinstance(final, FailedBody)
    assert final.error == error.info()


def test_a_job_pays_nothing_for_a_worker_that_fails_all_jobs(ledger: Ledger) -> None:
    ledger.submit("a", VqaJob(question="hello"))
    output = AttemptOutput("request", AttemptStream("a", 1))
    for error in (AWAY, StorageRefuses("no"), DiskFailed("no"), DecoderFailed("no"), BROKEN, OutOfMemory("no")):
        for _ in range(2):
            claim = claimed(ledger, "a")
            body = outcome_while_circuit_is_open(claim, error, output, Usage())
            assert isinstance(body, GiveBack)
            assert ledger.give_back("a", claim.fence, body.reason, body.pause_s, body.is_charged)
            ledger.reap()
    claim = claimed(ledger, "a")
    assert (claim.attempt, claim.num_retries) == (13, 0)
    assert isinstance(ending(claim, BROKEN), GiveBack), "its tries are all its own"


def test_a_refused_object_ends_also_on_a_sick_worker(ledger: Ledger) -> None:
    ledger.submit("a", VqaJob(question="hello"))
    claim = replace(claimed(ledger, "a"), num_retries=MAX_TRIES - 1)
    output = AttemptOutput("request", AttemptStream("a", 1))
    assert isinstance(outcome_while_circuit_is_open(claim, MediaRefused("no"), output, Usage()), FailedBody)


def test_a_full_disk_is_no_bug_and_no_fault_of_the_job() -> None:
    full = as_worker_error(OSError(28, "No space left on device"))
    assert isinstance(full, DiskFailed)
    assert (full.info().code, full.info().retryable) == (ErrorCode.STORAGE_UNAVAILABLE, True)
    assert "No space left on device" in str(full)
    assert isinstance(as_worker_error(OSError("a truncated picture")), Unforeseen)
    assert isinstance(as_worker_error(MemoryError()), OutOfMemory)


def test_deadline_passes_while_a_job_waits_for_its_storage(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", VqaJob(question="hello", deadline_s=60))
    claim = claimed(ledger, "a")
    ledger.give_back("a", claim.fence, RetryReason.STORAGE, 3600)
    redis_client.hset(names.job_key("a"), "deadline", "1")
    redis_client.zadd(names.DUE_KEY, {"a": 1})
    assert ledger.reap() == ()
    assert isinstance(events(redis_client, "a")[-1], JobExpired)
    assert event_types(redis_client, "a")[-2] == "job.retrying"


def test_pauses_after_storage_faults_differ_between_jobs() -> None:
    assert len({STORAGE_RETRIES.delay_s(1) for _ in range(50)}) > 1
