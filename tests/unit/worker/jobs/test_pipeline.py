"""Every end that a claimed job can have, against a real ledger; fakes of the engine, the media and the prompts."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import JobProgress, JobRetrying
from api_stub.contract.job import TaskName
from api_stub.contract.result import Usage
from api_stub.contract.status import JobStatus
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Claim, Finished
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import answer, claimed, event_types, events, lose
from tests.unit.worker.jobs.fakes import NUM_PROMPT_TOKENS, FakeLedger, Worker
from worker.engine.request import Ended
from worker.errors import (
    DecoderFailed,
    EngineDead,
    InvalidRequest,
    MediaNotFound,
    PromptTooLong,
    StorageRefuses,
    StorageUnavailable,
)
from worker.jobs.attempt import StopReason
from worker.jobs.circuit import CircuitState
from worker.jobs.outcome import MAX_TRIES

GENERATED = Usage(prompt_tokens=NUM_PROMPT_TOKENS, completion_tokens=2, images=1)


def connected(url: str, config: LedgerConfig) -> FakeLedger:
    return FakeLedger(Ledger.connect(url, config).client, config)


@pytest.fixture
def worker(redis_url: str, caplog: pytest.LogCaptureFixture) -> Iterator[Worker]:
    caplog.set_level("INFO")
    with closing(connected(redis_url, LedgerConfig())) as ledger:
        worker = Worker(ledger)
        worker.publisher.start()
        yield worker
        worker.publisher.stop(10)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.settle.FINISH_PAUSE_S", 0.01)
    monkeypatch.setattr("worker.jobs.pipeline.WAIT_S", 0.05)
    monkeypatch.setattr("worker.jobs.settle.LOOK_S", 0.05)


def ended(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says became of the attempts, in order."""
    return [str(vars(record)["outcome"]) for record in caplog.records if record.message == "job ended"]


def assert_failed(worker: Worker, job_id: str, code: ErrorCode) -> str:
    """The job has failed with a code, and is counted; return the message."""
    view = worker.view(job_id)
    assert view.status is JobStatus.FAILED
    assert view.error is not None
    assert view.error.code is code
    assert event_types(worker.ledger.client, job_id)[-1] == "job.failed"
    assert worker.count("request_failure_total", code=code.value) == 1
    assert worker.count("attempts_total", outcome="failed") == 1
    return view.error.message


def assert_given_back(worker: Worker, job_id: str, reason: str, *, is_charged: bool) -> None:
    """The job waits in the queue again, and the last event says why; a charge is one of its retries."""
    client = worker.ledger.client
    assert worker.view(job_id).status is JobStatus.QUEUED
    last = events(client, job_id)[-1]
    assert isinstance(last, JobRetrying)
    assert last.reason == reason
    row = client.hgetall(names.job_key(job_id))
    assert (row["retries"], row["losses"]) == (str(int(is_charged)), "0")
    assert worker.count("request_retry_total", reason=reason) == 1
    assert worker.count("attempts_total", outcome="given_back") == 1


def claimed_again(worker: Worker, job_id: str) -> Claim:
    """Claim a job that was given back; its pause is over at once."""
    client = worker.ledger.client
    client.hset(names.job_key(job_id), mapping={"alarm": "1", "not_before": "1"})
    client.zadd(names.DUE_KEY, {job_id: 1})
    worker.ledger.reap()
    return claimed(worker.ledger, job_id)


def test_an_answered_job_is_completed(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    claim = worker.claim(metadata={"order": 7})
    worker.run(claim)
    view = worker.view(claim.job_id)
    assert view.status is JobStatus.COMPLETED
    assert view.result is not None
    assert (view.result.text, view.result.finish_reason, view.result.usage) == ("It is blue", "stop", GENERATED)
    assert (view.result.attempt, view.result.metadata) == (1, {"order": 7})
    seen = events(worker.ledger.client, claim.job_id)
    stages = [event.stage.value for event in seen if isinstance(event, JobProgress)]
    assert list(dict.fromkeys(stages)) == ["fetching", "preparing", "prefill"]
    assert seen[-1].type == "job.completed"
    assert worker.text(claim.job_id) == "It is blue"
    assert ended(caplog) == ["job.completed:done"]
    started = next(vars(record) for record in caplog.records if record.message == "job started")
    assert (started["job_id"], started["attempt"], started["task"]) == (claim.job_id, 1, TaskName.VQA)
    assert worker.count("attempts_total", outcome="completed") == 1
    assert worker.count("request_success_total", finished_reason="stop") == 1
    assert worker.count("time_to_first_token_seconds_count") == 1
    assert worker.count("media_fetch_bytes_total") == 100


def test_a_job_without_media_reserves_and_fetches_nothing(worker: Worker) -> None:
    worker.media.error = AssertionError("nothing to fetch")
    claim = worker.claim(media=())
    worker.run(claim)
    result = worker.view(claim.job_id).result
    assert result is not None
    assert result.usage == GENERATED.model_copy(update={"images": 0})


def refused_by_prompts(worker: Worker) -> None:
    worker.prompts.refusal = InvalidRequest("task: no clips")


def refused_by_storage(worker: Worker) -> None:
    worker.media.error = MediaNotFound("s3://media/a.png: no such object")


def refused_by_engine(worker: Worker) -> None:
    worker.engine.refusal = PromptTooLong("a prompt of 9 tokens")


def failed_in_engine(worker: Worker) -> None:
    worker.engine.reason, worker.engine.error = Ended.FAILED, ErrorInfo.of(ErrorCode.PROMPT_TOO_LONG, "too long")


@pytest.mark.parametrize(
    ("refused", "code"),
    [
        (refused_by_prompts, ErrorCode.INVALID_REQUEST),
        (refused_by_storage, ErrorCode.MEDIA_NOT_FOUND),
        (refused_by_engine, ErrorCode.PROMPT_TOO_LONG),
        (failed_in_engine, ErrorCode.PROMPT_TOO_LONG),
    ],
)
def test_a_job_s_own_error_fails_it_at_once(
    refused: Callable[[Worker], None], code: ErrorCode, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    refused(worker)
    claim = worker.claim()
    worker.run(claim)
    assert_failed(worker, claim.job_id, code)
    assert ended(caplog) == ["job.failed:done"]
    assert worker.circuit.state is CircuitState.CLOSED


def test_a_job_of_another_model_is_a_mismatch(worker: Worker) -> None:
    claim = worker.claim(model="other")
    worker.run(claim)
    message = assert_failed(worker, claim.job_id, ErrorCode.MODEL_MISMATCH)
    assert "'other'" in message
    assert worker.engine.num_submitted == 0


@pytest.mark.parametrize(
    ("body", "problem", "said"),
    [
        ("", "colour: no such field", "colour: no such field"),
        ("", None, "job: the message was no valid job"),
        ("{}", None, "task"),
        ("no JSON", None, "JSON"),
    ],
)
def test_a_message_that_is_no_valid_job_fails_and_says_why(
    body: str, problem: str | None, said: str, worker: Worker
) -> None:
    job_id = str(uuid.uuid4())
    worker.ledger.adopt(job_id, task=TaskName.VQA, model="default", job=None, priority=6)
    worker.run(replace(claimed(worker.ledger, job_id), body=body), problem)
    assert said in assert_failed(worker, job_id, ErrorCode.INVALID_REQUEST)


def test_a_job_cancelled_while_it_generates_keeps_its_text(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.engine.reason = None
    claim = worker.claim()
    with worker.running(claim):
        worker.ledger.cancel(claim.job_id)
        worker.heartbeat.beat()
    view = worker.view(claim.job_id)
    assert view.status is JobStatus.CANCELLED
    assert view.error is not None
    assert view.error.code is ErrorCode.CANCELLED
    assert (view.partial_text, view.usage) == ("It is blue", GENERATED)
    assert event_types(worker.ledger.client, claim.job_id)[-2:] == ["output.delta", "job.cancelled"]
    assert len(worker.engine.cancelled) == 1, "the engine's row is free again"
    assert ended(caplog) == ["job.cancelled:done"]
    assert worker.count("attempts_stopped_total", reason="cancelled") == 1
    assert worker.count("request_failure_total", code="cancelled") == 1


def test_a_job_cancelled_while_its_media_are_read_never_reaches_the_engine(worker: Worker) -> None:
    claim = worker.claim()

    def cancel() -> None:
        worker.ledger.cancel(claim.job_id)
        worker.heartbeat.beat()

    worker.media.meanwhile = cancel
    worker.run(claim)
    view = worker.view(claim.job_id)
    assert (view.status, view.partial_text, view.usage) == (JobStatus.CANCELLED, "", Usage())
    assert worker.engine.num_submitted == 0


@pytest.mark.parametrize("is_deaf", [False, True], ids=["the engine obeys", "the engine does not answer"])
def test_a_deadline_ends_a_generation(is_deaf: bool, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.pipeline.FLUSH_TIMEOUT_S", 0.3)
    monkeypatch.setattr("worker.jobs.settle.FLUSH_TIMEOUT_S", 0.3)
    worker.engine.reason, worker.engine.is_deaf = None, is_deaf
    claim = worker.claim(deadline_s=60)
    with worker.running(claim):
        (attempt,) = worker.attempts.held()
        attempt.deadline_at = 0.0  # it passes now
    assert_failed(worker, claim.job_id, ErrorCode.DEADLINE_EXCEEDED)
    view = worker.view(claim.job_id)
    assert (view.partial_text, view.usage) == ("It is blue", GENERATED)
    assert len(worker.engine.cancelled) == 1
    assert worker.count("attempts_stopped_total", reason="deadline") == 1


def test_a_transient_error_is_retried_until_the_retries_are_spent(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.media.error = StorageUnavailable("storage did not answer")
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "storage", is_charged=True)
    assert float(str(worker.ledger.client.hget(names.job_key(claim.job_id), "not_before"))) > 0, "after a pause"
    worker.run(claimed_again(worker, claim.job_id))
    last = claimed_again(worker, claim.job_id)
    assert (last.attempt, last.num_retries) == (3, 2)
    worker.run(last)
    assert_failed(worker, claim.job_id, ErrorCode.STORAGE_UNAVAILABLE)
    assert ended(caplog) == ["given_back", "given_back", "job.failed:done"]
    assert worker.count("request_retry_total", reason="storage") == 2


def test_a_retried_job_completes_when_the_fault_is_over(worker: Worker) -> None:
    worker.media.error = StorageUnavailable("storage did not answer")
    claim = worker.claim()
    worker.run(claim)
    worker.media.error = None
    worker.run(claimed_again(worker, claim.job_id))
    result = worker.view(claim.job_id).result
    assert result is not None
    assert (result.text, result.attempt) == ("It is blue", 2)


def no_memory_for_its_prompt(worker: Worker) -> None:
    worker.prompts.error = MemoryError()


def no_memory_on_the_device(worker: Worker) -> None:
    worker.engine.reason, worker.engine.error = Ended.FAILED, ErrorInfo.of(ErrorCode.OUT_OF_MEMORY, "prefill: no room")


@pytest.mark.parametrize("overfill", [no_memory_for_its_prompt, no_memory_on_the_device])
def test_a_job_that_does_not_fit_is_tried_again_a_bounded_number_of_times(
    overfill: Callable[[Worker], None], worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    overfill(worker)
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "out_of_memory", is_charged=True)
    for _ in range(MAX_TRIES - 1):
        worker.run(claimed_again(worker, claim.job_id))
    assert_failed(worker, claim.job_id, ErrorCode.OUT_OF_MEMORY)
    assert ended(caplog) == ["given_back"] * (MAX_TRIES - 1) + ["job.failed:done"]


def drained(worker: Worker) -> None:
    worker.drain.give_back()


def unconfirmed(worker: Worker) -> None:
    (attempt,) = worker.attempts.held()
    attempt.stop(StopReason.UNCONFIRMED)


@pytest.mark.parametrize("stop", [drained, unconfirmed])
def test_a_worker_that_must_let_go_of_a_job_gives_it_back_without_charge(
    stop: Callable[[Worker], None], worker: Worker
) -> None:
    worker.engine.reason = None
    claim = worker.claim()
    with worker.running(claim):
        stop(worker)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=False)
    assert worker.text(claim.job_id) == "It is blue", "all of its text comes before the last event"
    assert len(worker.engine.cancelled) == 1
    assert worker.count("attempts_stopped_total", reason=stop.__name__) == 1
    assert claimed(worker.ledger, claim.job_id, "worker-2").attempt == 2, "at once"


def test_a_job_claimed_after_the_drain_is_given_back(worker: Worker) -> None:
    worker.drain.give_back()
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=False)
    assert worker.engine.num_submitted == 0


def taken_by_another(worker: Worker, job_id: str) -> Claim:
    lose(worker.ledger, worker.ledger.client, job_id)
    return claimed(worker.ledger, job_id, "worker-2")


def assert_still_the_other_s(worker: Worker, other: Claim, before: list[str]) -> None:
    """Nothing was written since `before`, and the other worker ends the job."""
    assert event_types(worker.ledger.client, other.job_id) == before
    assert worker.view(other.job_id).worker == "worker-2"
    assert worker.count("attempts_total", outcome="lost") == 1
    assert worker.count("request_retry_total", reason="given_back") == 0
    assert worker.ledger.finish(other.job_id, other.fence, answer(other, "theirs")) is Finished.DONE


def test_a_worker_that_hears_of_its_lost_lease_writes_nothing_more(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.engine.reason, worker.engine.is_deaf = None, True
    claim = worker.claim()
    with worker.running(claim):
        other = taken_by_another(worker, claim.job_id)
        before = event_types(worker.ledger.client, claim.job_id)
        worker.heartbeat.beat()
    assert_still_the_other_s(worker, other, before)
    assert len(worker.engine.cancelled) == 1
    assert ended(caplog) == ["lost"]


@pytest.mark.parametrize("error", [None, InvalidRequest("no"), StorageUnavailable("no")], ids=repr)
def test_a_worker_that_has_not_heard_of_its_lost_lease_writes_nothing_either(
    error: Exception | None, worker: Worker
) -> None:
    claim, taken = worker.claim(), []
    worker.media.error = error
    worker.media.meanwhile = lambda: taken.append(taken_by_another(worker, claim.job_id))
    worker.run(claim)
    assert_still_the_other_s(worker, taken[0], ["job.queued", "job.started", "job.retrying", "job.started"])


def engine_dies_while_it_generates(worker: Worker) -> None:
    worker.engine.reason, worker.engine.dies = None, True


def engine_fails_all_requests_and_dies(worker: Worker) -> None:
    worker.engine.reason, worker.engine.error = Ended.FAILED, ErrorInfo.of(ErrorCode.INTERNAL, "the step failed")
    worker.engine.dies = True


def engine_is_gone_already(worker: Worker) -> None:
    worker.engine.refusal = EngineDead("the engine has ended")


def publisher_dies(worker: Worker) -> None:
    worker.engine.reason = None
    worker.ledger.publish_error = KeyError("a defect")


@pytest.mark.parametrize(
    "die",
    [engine_dies_while_it_generates, engine_fails_all_requests_and_dies, engine_is_gone_already, publisher_dies],
)
def test_a_dead_engine_or_publisher_costs_the_job_nothing_and_ends_the_worker(
    die: Callable[[Worker], None], worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.jobs.pipeline.FLUSH_TIMEOUT_S", 0.3)
    monkeypatch.setattr("worker.jobs.settle.FLUSH_TIMEOUT_S", 0.3)
    die(worker)
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=False)
    assert worker.num_engine_dead == 1
    assert "engine is dead" in caplog.messages
    assert worker.circuit.state is CircuitState.CLOSED, "the process is restarted instead"


def test_text_that_cannot_be_sent_ends_its_request_in_the_engine_too(worker: Worker) -> None:
    worker.engine.reason, worker.engine.texts = None, ("It is ", cast("Any", 7), "blue")
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=True)
    assert len(worker.engine.cancelled) == 1
    assert worker.text(claim.job_id) == "It is "


def test_storage_that_refuses_the_worker_opens_the_circuit_and_charges_nobody(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.media.error = StorageRefuses("InvalidAccessKeyId", is_proven=True)
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=False)
    assert worker.circuit.reason == "storage: InvalidAccessKeyId"
    assert worker.count("worker_sick", reason="storage") == 1
    assert "worker is sick, no more jobs are claimed" in caplog.messages


def test_an_open_circuit_charges_no_job_that_still_runs(worker: Worker) -> None:
    claim = worker.claim()
    worker.open_circuit()
    worker.media.error = DecoderFailed("a decoder does not start")
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=False)


def test_a_job_that_passes_storage_closes_the_circuit(worker: Worker) -> None:
    worker.media.error = StorageRefuses("InvalidAccessKeyId", is_proven=True)
    claim = worker.claim()
    worker.run(claim)
    worker.media.error = None
    worker.run(claimed_again(worker, claim.job_id))
    assert worker.view(claim.job_id).status is JobStatus.COMPLETED
    assert worker.circuit.state is CircuitState.CLOSED
    assert worker.count("worker_sick", reason="storage") == 0


def nothing(worker: Worker) -> None:
    """The job completes."""


def lacks_storage(worker: Worker) -> None:
    worker.media.error = StorageUnavailable("storage did not answer")


@pytest.mark.parametrize(
    ("spoil", "status"), [(nothing, "completed"), (refused_by_prompts, "failed"), (lacks_storage, "queued")]
)
def test_an_end_is_written_once_redis_answers(
    spoil: Callable[[Worker], None], status: str, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(worker)
    worker.ledger.num_failures, worker.ledger.error = 5, redis.ConnectionError("away")
    claim = worker.claim()
    worker.run(claim)
    assert worker.view(claim.job_id).status == status
    assert caplog.messages.count("outcome of a job not recorded yet") == 5
    assert "outcome of a job not recorded" not in caplog.messages


def test_an_end_that_redis_refuses_for_good_is_given_up(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.ledger.num_failures, worker.ledger.error = 1_000, redis.ResponseError("WRONGTYPE not this kind of value")
    claim = worker.claim()
    worker.run(claim)
    assert worker.ledger.num_failures == 999
    assert ended(caplog) == ["unsettled"]
    assert worker.count("attempts_total", outcome="unsettled") == 1
    assert worker.count("request_success_total", finished_reason="stop") == 0
    assert worker.view(claim.job_id).status is JobStatus.IN_PROGRESS
    assert taken_by_another(worker, claim.job_id).attempt == 2, "a reaper finds it"


def test_a_drained_worker_waits_for_redis_no_longer_than_its_lease(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with closing(connected(redis_url, LedgerConfig(lease_s=0.5))) as ledger:
        worker = Worker(ledger)
        worker.publisher.start()
        try:
            ledger.num_failures, ledger.error = 1_000_000, redis.ConnectionError("away")
            worker.engine.reason = None
            claim = worker.claim()
            with worker.running(claim):
                worker.drain.give_back()
        finally:
            worker.publisher.stop(10)
        assert ended(caplog) == ["unsettled"]
        (left,) = (vars(record) for record in caplog.records if record.message == "outcome of a job not recorded")
        assert left["unconfirmed_s"] >= 0.5
        assert worker.view(claim.job_id).status is JobStatus.IN_PROGRESS


def test_a_lease_lost_while_redis_is_away_ends_the_waiting(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.ledger.num_failures, worker.ledger.error = 1_000_000, redis.ConnectionError("away")
    worker.engine.reason = None
    claim = worker.claim()
    with worker.running(claim):
        unconfirmed(worker)
        (attempt,) = worker.attempts.held()
        attempt.stop(StopReason.LOST)
    assert ended(caplog) == ["lost"]


@pytest.mark.parametrize("error", [KeyError("a defect"), RuntimeError("CUDA"), ZeroDivisionError()], ids=repr)
def test_an_unforeseen_exception_becomes_internal_and_does_not_escape(
    error: Exception, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.prompts.error = error
    claim = worker.claim()
    worker.run(claim)
    assert_given_back(worker, claim.job_id, "given_back", is_charged=True)
    for _ in range(MAX_TRIES - 1):
        worker.run(claimed_again(worker, claim.job_id))
    message = assert_failed(worker, claim.job_id, ErrorCode.INTERNAL)
    assert message == f"unexpected {type(error).__name__}; the worker's log has the details"
    (first, *_) = (record for record in caplog.records if record.message == "job failed unexpectedly")
    assert first.exc_info is not None
    assert first.exc_info[1] is error


def test_what_no_job_may_survive_escapes_and_leaves_nothing_behind(worker: Worker) -> None:
    worker.prompts.error = KeyboardInterrupt()
    claim = worker.claim()
    with pytest.raises(KeyboardInterrupt):
        worker.run(claim)
    assert len(worker.attempts) == 0, "nobody renews the lease: a reaper finds the job"
    assert worker.memory_budget.stats().num_bytes == 0
    assert worker.view(claim.job_id).status is JobStatus.IN_PROGRESS


def test_a_job_for_an_adapter_that_comes_later_goes_back_uncharged(worker: Worker) -> None:
    worker.wanted.add("red")
    claim = worker.claim(model="default:red")
    worker.run(claim)
    view = worker.ledger.view(claim.job_id)
    assert view is not None
    assert view.status is JobStatus.QUEUED
    assert event_types(worker.ledger.client, claim.job_id)[-1] == "job.retrying"
    assert worker.ledger.client.hget(names.job_key(claim.job_id), "retries") == "0"
    other = worker.claim(model="default:blue")
    worker.run(other)
    failed = worker.ledger.view(other.job_id)
    assert failed is not None
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == (
        ErrorCode.INVALID_REQUEST, "model: no adapter 'blue' of 'default' is served",
    )  # fmt: skip
