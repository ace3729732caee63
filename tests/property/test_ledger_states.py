"""Any order of ledger calls, on a real Redis, against a model of a job that fits on one page.

Time passes by moving a job's stored times into the past, so the model always knows what a sweep must do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

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
from api_stub.contract.job import Job, TaskName
from api_stub.contract.status import CELERY_STATES, TRANSITIONS, JobStatus
from api_stub.contract.view import JobSelection
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import (
    Cancelled,
    CancelledJobs,
    Claim,
    Deleted,
    Finished,
    Hold,
    JobConflict,
    Refusal,
    RefusalReason,
    Submission,
)
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.ledger_kit import answer, delta, events, lease_ends, question, ring_in, set_clock_back

MAX_ATTEMPTS = 2
MAX_JOBS = 6
TENANT_MAX_RUNNING = 1
WINDOW = 1
PRIORITY = 6
LISTS = tuple(names.list_id("default", step) for step in names.PRIORITY_STEPS)
WORKERS = ("worker-1", "worker-2")
TENANTS = st.sampled_from(("", "zoo", "park"))
TEXTS = st.text(alphabet='aé😀"\\/\n\x00<{', max_size=4)


@dataclass
class ModelJob:
    """What a job must look like."""

    job_id: str
    has_deadline: bool
    tenant: str = ""
    worker: str = ""
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    losses: int = 0
    fence: int | None = None
    finished_by: int | None = None
    is_cancelling: bool = False
    is_delayed: bool = False
    is_late: bool = False
    is_lease_over: bool = False
    is_deleted: bool = False
    number: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)

    @property
    def body(self) -> Job:
        fields = {"deadline_s": 3600.0} if self.has_deadline else {}
        return question(tenant=self.tenant, **fields)

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
        self.ledger = Ledger.connect(
            url, LedgerConfig(max_attempts=MAX_ATTEMPTS, window=WINDOW, tenant_max_running=TENANT_MAX_RUNNING)
        )
        self.redis = self.ledger.client
        self.model: dict[str, ModelJob] = {}
        self.last_fence = 0
        self.is_paused = False
        self.hours_back = 0

    @initialize(target=jobs, tenants=st.lists(TENANTS, min_size=2, max_size=4), is_adopted=st.booleans())
    def begin(self, tenants: list[str], is_adopted: bool) -> object:
        self.redis.flushall()
        self.ledger.reap()  # from now on a clock that is set back is noticed
        return multiple(*(self.create(is_adopted, False, tenant) for tenant in tenants))

    def teardown(self) -> None:
        self.ledger.close()

    # what producers do

    @precondition(lambda self: len(self.model) < MAX_JOBS)
    @rule(target=jobs, is_adopted=st.booleans(), has_deadline=st.booleans(), tenant=TENANTS)
    def create_another(self, is_adopted: bool, has_deadline: bool, tenant: str) -> str:
        return self.create(is_adopted, has_deadline, tenant)

    def create(self, is_adopted: bool, has_deadline: bool, tenant: str) -> str:
        job = ModelJob(f"job-{len(self.model)}", has_deadline, tenant)
        if is_adopted:
            made = self.ledger.adopt(job.job_id, task=TaskName.VQA, model="default", job=job.body, priority=PRIORITY)
            assert made is Submission.CREATED
        else:
            has_room = self._room(LISTS[2]) > 0 and not self.redis.exists(names.turns_key(LISTS[2]))
            must_wait = not has_room or self._is_capped(job) or self.is_paused
            made = self.ledger.submit(job.job_id, job.body)
            assert made is (Submission.HELD if must_wait else Submission.CREATED)
        self.model[job.job_id] = job
        return job.job_id

    @rule(job_id=jobs)
    def submit_again(self, job_id: str) -> None:
        job = self.model[job_id]
        is_held = self._is_held(job)
        assert self.ledger.submit(job_id, job.body) is (Submission.HELD if is_held else Submission.SAME)

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

    @rule(target=jobs, job_id=consumes(jobs))
    def delete(self, job_id: str) -> object:
        job = self.model[job_id]
        answer = self.ledger.delete(job_id)
        assert answer is (Deleted.DELETED if job.status.is_final else Deleted.UNFINISHED)
        if not job.status.is_final:
            return job_id
        job.is_deleted, job.finished_by = True, None
        assert self.ledger.delete(job_id) is Deleted.UNKNOWN
        return multiple()

    # what operators do

    @rule()
    def pause(self) -> None:
        assert self.ledger.pause("default").is_changed is not self.is_paused
        self.is_paused = True

    @rule()
    def resume(self) -> None:
        assert self.ledger.resume("default").is_changed is self.is_paused
        self.is_paused = False

    @rule()
    def purge(self) -> None:
        queued = [job for job in self.model.values() if job.status is JobStatus.QUEUED]
        assert self.ledger.purge("default") == len(queued)
        for job in queued:
            job.becomes(JobStatus.CANCELLED)

    @rule(tenant=TENANTS, status=st.sampled_from((None, JobStatus.QUEUED, JobStatus.IN_PROGRESS)))
    def cancel_many(self, tenant: str, status: Literal[JobStatus.QUEUED, JobStatus.IN_PROGRESS] | None) -> None:
        wanted = [
            job
            for job in self.model.values()
            if job.tenant == tenant and not job.status.is_final and status in (None, job.status)
        ]
        running = [job for job in wanted if job.status is JobStatus.IN_PROGRESS]
        done = self.ledger.cancel_jobs(tenant, JobSelection(status=status, model="default"))
        assert done == CancelledJobs(len(wanted) - len(running), len(running))
        for job in wanted:
            if job in running:
                job.is_cancelling = True
            else:
                job.becomes(JobStatus.CANCELLED)

    # what workers do

    @rule(target=claims, job_id=jobs, worker=st.sampled_from(WORKERS))
    def claim(self, job_id: str, worker: str) -> object:
        job = self.model[job_id]
        can_start = job.status is JobStatus.QUEUED and not job.is_late and not job.is_delayed
        must_be_apart = (
            can_start and job.losses > 0 and any(self._is_loser_on(other, worker) for other in self._others(job))
        )
        must_wait = can_start and not must_be_apart and (self._is_capped(job) or self.is_paused)
        claim = self.ledger.claim(job_id, worker)
        if isinstance(claim, Refusal):
            assert not can_start or must_be_apart or must_wait, claim
            assert (claim.reason is RefusalReason.APART) == must_be_apart
            assert (claim.reason is RefusalReason.HELD) == must_wait
            job.is_delayed = job.is_delayed or must_be_apart
            if job.status is JobStatus.QUEUED and job.is_late:
                job.becomes(JobStatus.EXPIRED)
            return multiple()
        assert can_start
        assert not must_be_apart
        assert not must_wait
        assert claim.fence > self.last_fence
        self.last_fence = job.fence = claim.fence
        job.becomes(JobStatus.IN_PROGRESS)
        job.attempt += 1
        job.number = 0
        job.worker = worker
        assert claim.attempt == job.attempt
        return claim

    def _others(self, job: ModelJob) -> list[ModelJob]:
        return [other for other in self.model.values() if other is not job]

    def _is_loser_on(self, job: ModelJob, worker: str) -> bool:
        return job.status is JobStatus.IN_PROGRESS and job.worker == worker and job.losses > 0

    def _is_capped(self, job: ModelJob) -> bool:
        """Others of its tenant run or are about to, as many as may."""
        others = [other for other in self._others(job) if other.tenant == job.tenant]
        return job.tenant != "" and sum(self._is_in_flight(other) for other in others) >= TENANT_MAX_RUNNING

    def _is_in_flight(self, job: ModelJob) -> bool:
        return job.status is JobStatus.IN_PROGRESS or self._is_waiting(job)

    def _list(self, job: ModelJob) -> str:
        return self.redis.hget(names.job_key(job.job_id), "list") or ""

    def _is_waiting(self, job: ModelJob) -> bool:
        return self.redis.zscore(names.waiting_key(self._list(job)), job.job_id) is not None

    def _is_held(self, job: ModelJob) -> bool:
        return self.redis.zscore(names.held_key(self._list(job), job.tenant), job.job_id) is not None

    def _room(self, list_id: str) -> int:
        window = max(WINDOW, 2 * self.redis.zcard(names.workers_key("default")))
        return window - self.redis.zcard(names.waiting_key(list_id))

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

    @rule(held=st.lists(claims, max_size=4), worker=st.sampled_from(WORKERS))
    def beat(self, held: list[Claim], worker: str) -> None:
        answers = self.ledger.beat(worker, "default", [(claim.job_id, claim.fence) for claim in held])
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

    @rule(claim=claims, delay_s=st.sampled_from((0.0, 3600.0)), is_charged=st.booleans())
    def give_back(self, claim: Claim, delay_s: float, is_charged: bool) -> None:
        job = self.model[claim.job_id]
        is_held = job.is_held_by(claim)
        given = self.ledger.give_back(claim.job_id, claim.fence, RetryReason.STORAGE, delay_s, is_charged)
        assert given is is_held
        if is_held:
            job.becomes(JobStatus.CANCELLED if job.is_cancelling else JobStatus.QUEUED)
            job.is_delayed = delay_s > 0

    @rule(job_ids=st.lists(jobs, max_size=3))
    def leave_doorbells_unanswered(self, job_ids: list[str]) -> None:
        """Doorbells of whatever jobs: only those that one announces get another."""
        announced = [job_id for job_id in job_ids if self._is_announced(self.model[job_id])]
        num_there = self._num_doorbells()
        num_rung = 0 if self.is_paused else len(announced)
        assert self.ledger.ring_again(job_ids) == num_rung
        assert self._num_doorbells() == num_there + num_rung
        has_its_place = self._is_held if self.is_paused else self._is_waiting
        assert all(has_its_place(self.model[job_id]) for job_id in announced)

    def _is_announced(self, job: ModelJob) -> bool:
        return job.status is JobStatus.QUEUED and self.redis.hget(names.job_key(job.job_id), "bell") not in (None, "0")

    def _num_doorbells(self) -> int:
        return sum(int(self.redis.llen(names.queue_list("default", step))) for step in names.PRIORITY_STEPS)

    @rule(claim=consumes(claims))
    def die(self, claim: Claim) -> None:
        """The worker forgets its claim; nobody will ever speak for it again."""

    # what time and the broker do

    @rule(job_id=jobs)
    def one_lease_ends(self, job_id: str) -> None:
        if self.model[job_id].status is JobStatus.IN_PROGRESS:
            self.end_lease(self.model[job_id])

    def end_lease(self, job: ModelJob) -> None:
        lease_ends(self.redis, job.job_id)
        job.is_lease_over = True

    @rule(worker=st.sampled_from(WORKERS))
    def worker_dies(self, worker: str) -> None:
        """With all that it runs, and somebody notices."""
        for job in self.model.values():
            if job.status is JobStatus.IN_PROGRESS and job.worker == worker:
                self.end_lease(job)
        self.reap()

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

    @rule(job_id=jobs)
    def waits_long(self, job_id: str) -> None:
        if self.model[job_id].status is JobStatus.QUEUED:
            self.redis.hset(names.job_key(job_id), "queued_at", "1")

    @rule()
    def clock_is_set_back(self) -> None:
        self.hours_back += 1
        set_clock_back(self.redis, 3600)

    @precondition(lambda self: self.hours_back > 0)
    @rule()
    def clock_is_set_right(self) -> None:
        """For the leases it is a gap in which nobody spoke."""
        self.hours_back -= 1
        set_clock_back(self.redis, -3600)
        for job in self.model.values():
            if job.status is JobStatus.IN_PROGRESS and not job.is_lease_over:
                self.redis.hincrbyfloat(names.job_key(job.job_id), "lease", self.ledger.config.lease_s / 4)

    @rule()
    def doorbells_arrive(self) -> None:
        ring_in(self.redis)

    @rule()
    def broker_forgets(self) -> None:
        self.redis.delete(*(names.queue_list("default", step) for step in names.PRIORITY_STEPS))

    @rule()
    def sweep(self) -> None:
        self.reap()

    def reap(self) -> None:
        self.ledger.beat("worker-3", "default", [])
        bells = [bell.job_id for bell in self.ledger.reap()]
        assert len(bells) == len(set(bells))
        for job in self.model.values():
            must_ring = False
            if job.status is JobStatus.QUEUED and job.is_late:
                job.becomes(JobStatus.EXPIRED)
            elif job.status is JobStatus.IN_PROGRESS and job.is_lease_over:
                job.losses += 1
                must_ring = self._lose(job)
            if must_ring and self.is_paused:
                assert self._is_held(job)
            elif must_ring:
                assert job.job_id in bells
            elif job.job_id in bells:
                assert job.status is JobStatus.QUEUED
                assert not job.is_delayed
                assert not self.is_paused

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
    def counts_every_tenants_jobs(self) -> None:
        in_flight: dict[str, int] = {}
        for job in self.model.values():
            if job.tenant and self._is_in_flight(job):
                in_flight[job.tenant] = in_flight.get(job.tenant, 0) + 1
        counted = self.redis.hgetall(names.tenants_key("default"))
        assert {tenant: int(num) for tenant, num in counted.items()} == in_flight
        running = [job.tenant for job in self.model.values() if job.status is JobStatus.IN_PROGRESS and job.tenant]
        assert all(running.count(tenant) <= TENANT_MAX_RUNNING for tenant in running)

    @invariant()
    def knows_which_jobs_have_lost_a_worker(self) -> None:
        for worker in WORKERS:
            losers = {job.job_id for job in self.model.values() if self._is_loser_on(job, worker)}
            assert self.redis.smembers(names.suspects_key(worker)) == losers

    @invariant()
    def holds_nobody_back_who_may_go(self) -> None:
        held = {list_id: [job for job in self.model.values() if self._is_held(job) and self._list(job) == list_id]
                for list_id in LISTS}  # fmt: skip
        assert self.redis.hgetall(names.NUM_HELD_KEY) == {key: str(len(jobs)) for key, jobs in held.items() if jobs}
        for list_id, jobs in held.items():
            in_turn = set(self.redis.zrange(names.turns_key(list_id), 0, -1))
            assert in_turn <= {job.tenant for job in jobs}
            assert {job.tenant for job in jobs if not self._is_capped(job)} <= in_turn
            free = [job for job in jobs if not self._is_capped(job)]
            assert not free or self.is_paused or self._room(list_id) <= 0

    @invariant()
    def every_job_is_where_its_model_is(self) -> None:
        for job in self.model.values():
            view = self.ledger.view(job.job_id)
            if job.is_deleted:
                self._check_gone(job)
                continue
            assert view is not None
            warnings, is_queued = " ".join(view.warnings or ()), job.status is JobStatus.QUEUED
            assert ("is paused" in warnings) is (self.is_paused and is_queued)
            assert ("no worker serves" in warnings) is (is_queued and not view.num_workers)
            assert (view.status, view.attempt, view.cancelling) == (job.status, job.attempt, job.is_cancelling)
            self._check_stream(job)
            {JobStatus.QUEUED: self._check_queued, JobStatus.IN_PROGRESS: self._check_running}.get(
                job.status, self._check_final
            )(job)

    def _check_gone(self, job: ModelJob) -> None:
        """Nothing is left of it, and nobody has it in mind."""
        assert self.ledger.view(job.job_id) is None
        assert not self.redis.exists(*(key(job.job_id) for key in (names.job_key, names.result_key, names.events_key)))
        assert self.redis.zscore(names.jobs_key(job.tenant), job.job_id) is None
        assert self.redis.zscore(names.DUE_KEY, job.job_id) is None
        assert job.job_id not in self.redis.lrange(names.DEAD_KEY, 0, -1)

    def _check_stream(self, job: ModelJob) -> None:
        stream = events(self.redis, job.job_id)  # asserts that seq has no gaps, and when the stream begins
        assert stream[0].type == "job.queued"
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
        is_waiting = self._is_waiting(job)
        assert [is_waiting, "alarm" in row, self._is_held(job)].count(True) == 1
        if "alarm" in row or job.has_deadline:
            assert due is not None
            assert due <= min(float(row.get("alarm", "inf")), float(row.get("deadline", "inf")))
        assert "worker" not in row
        assert self.redis.ttl(names.job_key(job.job_id)) == -1

    def _check_running(self, job: ModelJob) -> None:
        """It has an owner, a lease and no doorbell."""
        row = self.redis.hgetall(names.job_key(job.job_id))
        assert (row["worker"], row["fence"]) == (job.worker, str(job.fence))
        assert self.redis.zscore(names.DUE_KEY, job.job_id) is not None
        assert not self._is_waiting(job)
        assert not self._is_held(job)
        assert "alarm" not in row
        assert not self.redis.exists(names.result_key(job.job_id))

    def _check_final(self, job: ModelJob) -> None:
        """Nobody looks at it any more, and everything about it will go."""
        assert self.redis.zscore(names.DUE_KEY, job.job_id) is None
        assert not self._is_waiting(job)
        assert not self._is_held(job)
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
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
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
