"""Any order of ledger calls, on a real Redis, against a model of a job that fits on one page.

Time passes by moving a job's stored times into the past, so the model always knows what a sweep must do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import CancelledBody, FailedBody, FinalEvent, OutputDelta, RetryReason
from api_stub.contract.job import TaskName
from api_stub.contract.status import CELERY_STATES, TRANSITIONS, JobStatus
from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled, Claim, Finished, Hold, JobConflict, Refusal, Submission
from tests.unit.api_stub.ledger_kit import answer, delta, events, lease_ends, question, ring_in

MAX_ATTEMPTS = 2
MAX_JOBS = 4
PRIORITY = 6
LIST = names.list_id("default", names.priority_step(PRIORITY))
WAITING = names.waiting_key(LIST)
TEXTS = st.text(alphabet='aé😀"\\/\n\x00<{', max_size=4)


@dataclass
class ModelJob:
    """What a job must look like."""

    job_id: str
    has_deadline: bool
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    losses: int = 0
    fence: int | None = None
    finished_by: int | None = None
    is_cancelling: bool = False
    is_delayed: bool = False
    is_late: bool = False
    is_lease_over: bool = False
    number: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)

    def becomes(self, status: JobStatus) -> None:
        assert status in TRANSITIONS[self.status], f"{self.status} -> {status}"
        self.status = status
        self.is_cancelling = self.is_delayed = self.is_lease_over = False

    def is_held_by(self, claim: Claim) -> bool:
        return self.status is JobStatus.IN_PROGRESS and self.fence == claim.fence


class LedgerMachine(RuleBasedStateMachine):
    """The ledger beside its model."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self, url: str) -> None:
        super().__init__()
        self.ledger = Ledger.connect(url, LedgerConfig(max_attempts=MAX_ATTEMPTS))
        self.redis = self.ledger.client
        self.model: dict[str, ModelJob] = {}
        self.last_fence = 0

    @initialize()
    def empty(self) -> None:
        self.redis.flushall()

    def teardown(self) -> None:
        self.ledger.close()

    # what producers do

    @precondition(lambda self: len(self.model) < MAX_JOBS)
    @rule(target=jobs, is_adopted=st.booleans(), has_deadline=st.booleans())
    def create(self, is_adopted: bool, has_deadline: bool) -> str:
        job_id = f"job-{len(self.model)}"
        job = question(deadline_s=3600.0) if has_deadline else question()
        if is_adopted:
            made = self.ledger.adopt(job_id, task=TaskName.VQA, model="default", job=job, priority=PRIORITY)
        else:
            made = self.ledger.submit(job_id, job)
        assert made is Submission.CREATED
        self.model[job_id] = ModelJob(job_id, has_deadline)
        return job_id

    @rule(job_id=jobs)
    def submit_again(self, job_id: str) -> None:
        job = question(deadline_s=3600.0) if self.model[job_id].has_deadline else question()
        assert self.ledger.submit(job_id, job) is Submission.SAME

    @rule(job_id=jobs)
    def submit_something_else(self, job_id: str) -> None:
        try:
            self.ledger.submit(job_id, question("Something else?"))
        except JobConflict:
            return
        raise AssertionError("another body was taken for the same job")

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        job = self.model[job_id]
        expected = Cancelled.FINAL
        if job.status is JobStatus.QUEUED:
            expected = Cancelled.CANCELLED
            job.becomes(JobStatus.CANCELLED)
        elif job.status is JobStatus.IN_PROGRESS:
            expected = Cancelled.CANCELLING
            job.is_cancelling = True
        assert self.ledger.cancel(job_id) is expected

    # what workers do

    @rule(target=claims, job_id=jobs)
    def claim(self, job_id: str) -> object:
        job = self.model[job_id]
        can_start = job.status is JobStatus.QUEUED and not job.is_late and not job.is_delayed
        claim = self.ledger.claim(job_id, "worker")
        if isinstance(claim, Refusal):
            assert not can_start, claim
            if job.status is JobStatus.QUEUED and job.is_late:
                job.becomes(JobStatus.EXPIRED)
            return multiple()
        assert can_start
        assert claim.fence > self.last_fence
        self.last_fence = job.fence = claim.fence
        job.becomes(JobStatus.IN_PROGRESS)
        job.attempt += 1
        job.number = 0
        assert claim.attempt == job.attempt
        return claim

    @rule(claim=claims, texts=st.lists(TEXTS, max_size=3), num_replayed=st.integers(0, 2))
    def publish(self, claim: Claim, texts: list[str], num_replayed: int) -> None:
        job = self.model[claim.job_id]
        first_new = job.number + 1
        first = max(1, first_new - num_replayed)
        batch = [delta(claim, number, "replayed") for number in range(first, first_new)]
        batch += [delta(claim, first_new + i, text) for i, text in enumerate(texts)]
        is_held = job.is_held_by(claim)
        assert self.ledger.publish(batch) == (is_held,) * len(batch)
        if is_held:
            job.number += len(texts)
            job.texts.setdefault(job.attempt, []).extend(texts)

    @rule(held=st.lists(claims, max_size=4))
    def beat(self, held: list[Claim]) -> None:
        answers = self.ledger.beat("worker", "default", [(claim.job_id, claim.fence) for claim in held])
        for claim, hold in zip(held, answers, strict=True):
            job = self.model[claim.job_id]
            if not job.is_held_by(claim):
                assert hold is Hold.LOST
                continue
            assert hold is (Hold.CANCEL if job.is_cancelling else Hold.HELD)
            job.is_lease_over = False

    @rule(claim=claims, ending=st.sampled_from(("completed", "failed", "cancelled")))
    def finish(self, claim: Claim, ending: str) -> None:
        job = self.model[claim.job_id]
        error = ErrorInfo.of(ErrorCode.INTERNAL, "it broke")
        bodies = {
            "completed": answer(claim),
            "failed": FailedBody(error=error),
            "cancelled": CancelledBody(error=error),
        }
        finished = self.ledger.finish(claim.job_id, claim.fence, bodies[ending])
        if job.is_held_by(claim):
            assert finished is Finished.DONE
            job.becomes(JobStatus(ending))
            job.finished_by = claim.fence
        else:
            assert finished is (Finished.ALREADY if job.finished_by == claim.fence else Finished.LOST)

    @rule(claim=claims, delay_s=st.sampled_from((0.0, 3600.0)))
    def give_back(self, claim: Claim, delay_s: float) -> None:
        job = self.model[claim.job_id]
        is_held = job.is_held_by(claim)
        assert self.ledger.give_back(claim.job_id, claim.fence, RetryReason.STORAGE, delay_s) is is_held
        if is_held:
            job.becomes(JobStatus.CANCELLED if job.is_cancelling else JobStatus.QUEUED)
            job.is_delayed = delay_s > 0

    @rule(claim=consumes(claims))
    def die(self, claim: Claim) -> None:
        """The worker forgets its claim; nobody will ever speak for it again."""

    # what time and the broker do

    @rule(job_id=jobs)
    def lease_ends(self, job_id: str) -> None:
        job = self.model[job_id]
        if job.status is JobStatus.IN_PROGRESS:
            lease_ends(self.redis, job_id)
            job.is_lease_over = True

    @rule()
    def nobody_reaches_redis(self) -> None:
        """Longer than a lease: no job may be charged for it."""
        running = [job for job in self.model.values() if job.status is JobStatus.IN_PROGRESS]
        for job in running:
            self.redis.zadd(names.DUE_KEY, {job.job_id: 1})

    @rule(job_id=jobs)
    def deadline_passes(self, job_id: str) -> None:
        job = self.model[job_id]
        if job.has_deadline and not job.status.is_final:
            self.redis.hset(names.job_key(job_id), "deadline", "1")
            job.is_late = True
            if job.status is JobStatus.QUEUED:
                self.redis.zadd(names.DUE_KEY, {job_id: 1})

    @rule(job_id=jobs)
    def alarm_rings(self, job_id: str) -> None:
        """A grace or a retry's delay is over."""
        job = self.model[job_id]
        if self.redis.hexists(names.job_key(job_id), "alarm"):
            self.redis.hset(names.job_key(job_id), mapping={"alarm": "1", "not_before": "1"})
            self.redis.zadd(names.DUE_KEY, {job_id: 1})
            job.is_delayed = False

    @rule()
    def doorbells_arrive(self) -> None:
        ring_in(self.redis)

    @rule()
    def broker_forgets(self) -> None:
        self.redis.delete(names.queue_list("default", names.priority_step(PRIORITY)))

    @rule()
    def reap(self) -> None:
        bells = [bell.job_id for bell in self.ledger.reap()]
        assert len(bells) == len(set(bells))
        for job in self.model.values():
            must_ring = False
            if job.status is JobStatus.QUEUED and job.is_late:
                job.becomes(JobStatus.EXPIRED)
            elif job.status is JobStatus.IN_PROGRESS and job.is_lease_over:
                job.losses += 1
                must_ring = self._lose(job)
            if must_ring:
                assert job.job_id in bells
            elif job.job_id in bells:
                assert job.status is JobStatus.QUEUED
                assert not job.is_delayed

    def _lose(self, job: ModelJob) -> bool:
        if job.is_cancelling:
            job.becomes(JobStatus.CANCELLED)
        elif job.is_late or job.losses >= MAX_ATTEMPTS:
            job.becomes(JobStatus.FAILED)
        else:
            job.becomes(JobStatus.QUEUED)
            return True
        return False

    # what must always hold

    @invariant()
    def counts_every_job_that_is_not_final(self) -> None:
        num_open = sum(not job.status.is_final for job in self.model.values())
        assert int(self.redis.get(names.depth_key("default")) or 0) == num_open

    @invariant()
    def every_job_is_where_its_model_is(self) -> None:
        for job in self.model.values():
            view = self.ledger.view(job.job_id)
            assert view is not None
            assert (view.status, view.attempt, view.cancelling) == (job.status, job.attempt, job.is_cancelling)
            self._check_stream(job)
            {JobStatus.QUEUED: self._check_queued, JobStatus.IN_PROGRESS: self._check_running}.get(
                job.status, self._check_final
            )(job)

    def _check_stream(self, job: ModelJob) -> None:
        stream = events(self.redis, job.job_id)  # asserts that seq has no gaps
        finals = [event for event in stream if isinstance(event, FinalEvent)]
        assert len(finals) == int(job.status.is_final)
        if finals:
            assert finals == stream[-1:]
            assert finals[0].type == f"job.{job.status}"
        attempts = [event.attempt for event in stream]
        assert attempts == sorted(attempts)
        texts: dict[int, list[str]] = {}
        for event in stream:
            if isinstance(event, OutputDelta):
                texts.setdefault(event.attempt, []).append(event.text)
        assert texts == {attempt: published for attempt, published in job.texts.items() if published}
        self._check_partial_text(job, finals)

    def _check_partial_text(self, job: ModelJob, finals: list[FinalEvent]) -> None:
        for event in finals:
            if event.type != "job.completed" and job.finished_by is None:
                assert event.partial_text == "".join(job.texts.get(job.attempt, []))

    def _check_queued(self, job: ModelJob) -> None:
        """Somebody will look at it: it waits for a doorbell, or a reaper has it in mind."""
        row = self.redis.hgetall(names.job_key(job.job_id))
        due = self.redis.zscore(names.DUE_KEY, job.job_id)
        is_waiting = self.redis.zscore(WAITING, job.job_id) is not None
        assert is_waiting != ("alarm" in row)
        if "alarm" in row or job.has_deadline:
            assert due is not None
            assert due <= min(float(row.get("alarm", "inf")), float(row.get("deadline", "inf")))
        if is_waiting:
            assert self.redis.sismember(names.LISTS_KEY, LIST)
        assert "worker" not in row
        assert self.redis.ttl(names.job_key(job.job_id)) == -1

    def _check_running(self, job: ModelJob) -> None:
        """It has an owner, a lease and no doorbell."""
        row = self.redis.hgetall(names.job_key(job.job_id))
        assert (row["worker"], row["fence"]) == ("worker", str(job.fence))
        assert self.redis.zscore(names.DUE_KEY, job.job_id) is not None
        assert self.redis.zscore(WAITING, job.job_id) is None
        assert "alarm" not in row
        assert not self.redis.exists(names.result_key(job.job_id))

    def _check_final(self, job: ModelJob) -> None:
        """Nobody looks at it any more, and everything about it will go."""
        assert self.redis.zscore(names.DUE_KEY, job.job_id) is None
        assert self.redis.zscore(WAITING, job.job_id) is None
        meta = json.loads(self.redis.get(names.result_key(job.job_id)) or "{}")
        assert meta["status"] == CELERY_STATES[job.status]
        for key in (names.job_key, names.result_key, names.events_key):
            assert self.redis.ttl(key(job.job_id)) > 0


def machine(url: str) -> Callable[[], LedgerMachine]:
    return lambda: LedgerMachine(url)


def test_any_order_of_calls_keeps_the_ledgers_promises(redis_url: str) -> None:
    run_state_machine_as_test(
        machine(redis_url),
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_submitted_number_outlives_its_jobs(redis_client: redis.Redis, redis_url: str) -> None:
    """The watermark compares numbers of doorbells, so they must never start again."""
    ledger = Ledger.connect(redis_url, LedgerConfig())
    for job_id in ("a", "b"):
        ledger.submit(job_id, question())
        ledger.cancel(job_id)
        ledger.reap()
    ledger.close()
    assert redis_client.get(names.SUBMITTED_KEY) == "2"
