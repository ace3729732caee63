"""Each transition of the ledger, alone, on a real Redis."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
import redis

from api_stub.contract import names
from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.event import (
    CancelledBody,
    JobCancelled,
    JobCompleted,
    JobExpired,
    JobQueued,
    JobRetrying,
    JobStarted,
    OutputDelta,
    ProgressBody,
    RetryReason,
    Stage,
    parse_event,
)
from api_stub.contract.job import TaskName, parse_job
from api_stub.contract.status import JobStatus
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import (
    Cancelled,
    Finished,
    Hold,
    JobConflict,
    LedgerFull,
    Publication,
    Refusal,
    RefusalReason,
    Submission,
)
from api_stub.ledger.settings import LedgerConfig
from tests.servers import eventually
from tests.unit.api_stub.ledger_kit import (
    HASTY,
    answer,
    claimed,
    delta,
    doorbells_in,
    event_types,
    events,
    failure,
    lose,
    question,
    started,
)

Connect = Callable[[LedgerConfig], Ledger]
ODD_TEXT = 'naïve "quotes" \\ / \n\t\x01 emoji 😀 漢字 \u2028 <image> {}[]'


@pytest.fixture
def connect(redis_url: str) -> Iterator[Connect]:
    """Opens ledgers that are closed after the test."""
    with ExitStack() as opened:
        yield lambda config: opened.enter_context(closing(Ledger.connect(redis_url, config)))


@pytest.fixture
def ledger(connect: Connect) -> Ledger:
    return connect(LedgerConfig())


def depth(client: redis.Redis, model: str = "default") -> int:
    return int(client.get(names.depth_key(model)) or 0)


# submit


def test_submitted_job_is_queued_and_announced_as_event_number_one(ledger: Ledger, redis_client: redis.Redis) -> None:
    assert ledger.submit("a", question(priority=3, tenant="zoo")) is Submission.CREATED
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.model, view.priority, view.tenant) == (JobStatus.QUEUED, "default", 3, "zoo")
    assert (view.attempt, view.num_workers, view.started_at) == (0, 0, None)
    [queued] = events(redis_client, "a")
    assert isinstance(queued, JobQueued)
    assert (queued.model, queued.priority, queued.attempt) == ("default", 3, 0)
    assert queued.ts == pytest.approx(view.created_at)
    assert depth(redis_client) == 1


@pytest.mark.parametrize("second", ["claim", "cancel", "expire"])
def test_a_jobs_stream_begins_with_its_second_event_and_says_the_first_as_it_was_published(
    ledger: Ledger, redis_client: redis.Redis, second: str
) -> None:
    heard: list[str] = []
    with redis_client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(names.events_key("a"))
        ledger.submit("a", question(priority=3, deadline_s=60))
        ledger.submit("a", question(priority=3, deadline_s=60))

        def hear() -> bool:
            published = channel.get_message()
            heard.extend([published["data"]] if published else [])
            return published is None

        eventually(lambda: hear() and heard, 5.0, "it is published")
    assert not redis_client.exists(names.events_key("a"))
    assert len(heard) == 1
    assert ledger.replay("a").events == (*heard,)
    assert ledger.replay("a", limit=1).events == (*heard,)
    assert ledger.replay("a", after=1).events == ledger.replay("a", after=None).events == ()
    if second == "claim":
        claimed(ledger, "a")
    elif second == "cancel":
        ledger.cancel("a")
    else:
        redis_client.hset(names.job_key("a"), "deadline", "1")
        ledger.claim("a", "worker-1")
    whole = ledger.replay("a").events
    assert whole[:1] == (*heard,)
    assert [fields["event"] for _, fields in redis_client.xrange(names.events_key("a"))] == list(whole)
    assert len(whole) == 2
    assert ledger.replay("a", limit=1).events == whole[:1]
    assert ledger.replay("a", after=1).events == whole[1:]


def test_the_first_event_is_not_told_again_when_a_finished_jobs_stream_is_gone(
    ledger: Ledger, redis_client: redis.Redis
) -> None:
    claim = started(ledger, "a")
    ledger.finish("a", claim.fence, answer(claim))
    redis_client.delete(names.events_key("a"))
    replay = ledger.replay("a")
    assert (replay.events, replay.ending is not None) == ((), True)


def test_same_id_and_body_is_the_same_job(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    assert ledger.submit("a", question()) is Submission.SAME
    assert event_types(redis_client, "a") == ["job.queued"]
    assert depth(redis_client) == 1


def test_same_id_and_other_body_is_refused(ledger: Ledger) -> None:
    ledger.submit("a", question("one"))
    with pytest.raises(JobConflict, match="'a'"):
        ledger.submit("a", question("two"))


def test_admission_limit_counts_queued_and_running_jobs_of_one_model(connect: Connect) -> None:
    ledger = connect(LedgerConfig(max_queued=2))
    claim = started(ledger, "a")
    ledger.submit("b", question())
    with pytest.raises(LedgerFull) as full:
        ledger.submit("c", question())
    assert (full.value.model, full.value.limit) == ("default", 2)
    assert full.value.retry_after_s > 0
    assert ledger.view("c") is None
    assert ledger.submit("b", question()) is Submission.SAME  # an old job is never turned away
    assert ledger.submit("d", question(model="other")) is Submission.CREATED
    ledger.finish("a", claim.fence, answer(claim))
    assert ledger.submit("c", question()) is Submission.CREATED


def test_body_comes_back_byte_for_byte(ledger: Ledger) -> None:
    job = question(ODD_TEXT, sampling={"seed": 2**63 - 1}, metadata={"big": 2**60 + 1, "none": None, "empty": []})
    ledger.submit("a", job)
    body = claimed(ledger, "a").body
    assert body == job.resolved("a").to_json()
    assert parse_job(body) == job.resolved("a")


def test_a_new_job_does_not_inherit_an_old_streams_events(ledger: Ledger, redis_client: redis.Redis) -> None:
    redis_client.xadd(names.events_key("a"), {"event": "old"}, id="77-0")
    redis_client.set(names.result_key("a"), "old")
    ledger.submit("a", question())
    assert event_types(redis_client, "a") == ["job.queued"]
    assert redis_client.get(names.result_key("a")) is None


# adopt


def test_adopted_job_is_queued_then_claimed(ledger: Ledger, redis_client: redis.Redis) -> None:
    job = question(deadline_s=60)
    made = ledger.adopt("a", task=TaskName.VQA, model="default", job=job, priority=4)
    assert made is Submission.CREATED
    claim = claimed(ledger, "a")
    assert parse_job(claim.body) == job.resolved("a")
    assert claim.deadline_left_s == pytest.approx(60, abs=5)
    assert event_types(redis_client, "a") == ["job.queued", "job.started"]


def test_adoption_knows_no_admission_limit_and_may_happen_twice(connect: Connect, redis_client: redis.Redis) -> None:
    ledger = connect(LedgerConfig(max_queued=1))
    ledger.submit("a", question())
    for expected in (Submission.CREATED, Submission.SAME):
        assert ledger.adopt("b", task=TaskName.VQA, model="default", job=question(), priority=6) is expected
    with pytest.raises(JobConflict):
        ledger.adopt("b", task=TaskName.VQA, model="default", job=question("other"), priority=6)
    assert depth(redis_client) == 2


def test_invalid_message_is_adopted_without_a_body_and_can_be_failed(ledger: Ledger) -> None:
    ledger.adopt("a", task=TaskName.CAPTION, model="default", job=None, priority=99)
    claim = claimed(ledger, "a")
    assert (claim.body, claim.task) == ("", TaskName.CAPTION)
    assert ledger.finish("a", claim.fence, failure()) is Finished.DONE
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.priority) == (JobStatus.FAILED, 9)


# claim


def test_claim_starts_an_attempt_with_a_new_fence(ledger: Ledger, redis_client: redis.Redis) -> None:
    first, second = started(ledger, "a"), started(ledger, "b")
    assert second.fence > first.fence > 0
    assert (first.attempt, first.deadline_left_s, first.model, first.task) == (1, None, "default", TaskName.VQA)
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.worker, view.attempt) == (JobStatus.IN_PROGRESS, "worker-1", 1)
    event = events(redis_client, "a")[-1]
    assert isinstance(event, JobStarted)
    assert (event.worker, event.model, event.attempt) == ("worker-1", "default", 1)


def test_refusals_say_why(ledger: Ledger, redis_client: redis.Redis) -> None:
    def reason(job_id: str) -> RefusalReason:
        refusal = ledger.claim(job_id, "worker-2")
        assert isinstance(refusal, Refusal)
        return refusal.reason

    assert reason("nobody") is RefusalReason.UNKNOWN
    claim = started(ledger, "a")
    assert reason("a") is RefusalReason.BUSY
    ledger.finish("a", claim.fence, answer(claim))
    assert reason("a") is RefusalReason.FINAL
    ledger.submit("b", question())
    ledger.cancel("b")
    assert reason("b") is RefusalReason.CANCELLED
    ledger.submit("c", question(deadline_s=60))
    redis_client.hset(names.job_key("c"), "deadline", "1")
    assert reason("c") is RefusalReason.EXPIRED
    assert event_types(redis_client, "c") == ["job.queued", "job.expired"]
    assert reason("c") is RefusalReason.EXPIRED


def test_claim_repeated_with_its_token_is_the_same_claim(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    first, again = ledger.claim("a", "worker-1", "delivery-1"), ledger.claim("a", "worker-1", "delivery-1")
    assert not isinstance(first, Refusal)
    assert not isinstance(again, Refusal)
    assert (again.fence, again.attempt, again.queued_s) == (first.fence, first.attempt, first.queued_s)
    assert ledger.claim("a", "worker-1", "delivery-2") == Refusal(RefusalReason.BUSY)
    assert event_types(redis_client, "a") == ["job.queued", "job.started"]


def test_of_many_claims_at_once_one_wins(ledger: Ledger) -> None:
    ledger.submit("a", question())
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(ledger.claim("a", "worker"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(type(reply).__name__ for reply in answers) == ["Claim"] + ["Refusal"] * 7


# beat


def test_beat_tells_held_lost_and_cancelled_jobs_apart(ledger: Ledger) -> None:
    held, cancelled = started(ledger, "a"), started(ledger, "b")
    ledger.cancel("b")
    pairs = [("a", held.fence), ("a", held.fence + 9), ("b", cancelled.fence), ("nobody", 1)]
    assert ledger.beat("worker-1", "default", pairs) == (Hold.HELD, Hold.LOST, Hold.CANCEL, Hold.LOST)


def test_beat_extends_the_lease(connect: Connect, redis_client: redis.Redis) -> None:
    hasty, patient = connect(HASTY), connect(LedgerConfig(lease_s=60))
    claim = started(hasty, "a")
    patient.beat("worker-1", "default", [("a", claim.fence)])
    [(_, lease_ends)] = redis_client.zrange(names.DUE_KEY, 0, -1, withscores=True)
    seconds, _ = redis_client.time()
    assert lease_ends - seconds > 50
    assert hasty.reap() == ()


def test_beating_workers_are_counted_until_they_leave_or_fall_silent(
    connect: Connect, redis_client: redis.Redis
) -> None:
    def num_workers(ledger: Ledger) -> int:
        view = ledger.view("a")
        assert view is not None
        return view.num_workers

    patient, hasty = connect(LedgerConfig()), connect(HASTY)
    patient.submit("a", question())
    patient.beat("worker-1", "default", [])
    patient.beat("worker-2", "default", [])
    patient.beat("worker-3", "other", [])
    assert num_workers(hasty) == 2
    patient.leave("worker-1", "default")
    assert num_workers(hasty) == 1
    hasty.beat("worker-2", "default", [])
    eventually(lambda: num_workers(hasty) == 0, what="silence is noticed")
    eventually(lambda: not redis_client.exists(names.workers_key("default")), what="no key is left behind")


def test_a_silent_worker_is_not_counted_beside_a_living_one(connect: Connect) -> None:
    patient, hasty = connect(LedgerConfig()), connect(HASTY)
    patient.submit("a", question())
    hasty.beat("silent", "default", [])
    patient.beat("living", "default", [])

    def num_workers() -> int:
        view = patient.view("a")
        assert view is not None
        return view.num_workers

    eventually(lambda: num_workers() == 1, 5, what="only the living one is counted")


# publish


def test_published_events_reach_stream_and_channel_as_the_same_bytes(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    with redis_client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(names.events_key("a"))
        channel.get_message(timeout=5)
        progress = ProgressBody(stage=Stage.FETCHING, done=1, total=2)
        written = ledger.publish([delta(claim, 1, ODD_TEXT), Publication("a", claim.fence, 2, progress)])
        heard = [channel.get_message(timeout=5) for _ in range(2)]
    assert written == (True, True)
    stored = [fields["event"] for _, fields in redis_client.xrange(names.events_key("a"))][2:]
    assert [message and message["data"] for message in heard] == stored
    first, second = (parse_event(event) for event in stored)
    assert isinstance(first, OutputDelta)
    assert (first.text, first.seq, first.attempt) == (ODD_TEXT, 3, 1)
    assert (second.type, second.seq) == ("job.progress", 4)


def test_publishing_again_after_a_lost_reply_writes_nothing_twice(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    batch = [delta(claim, 1, "on"), delta(claim, 2, "ce")]
    assert ledger.publish(batch) == ledger.publish(batch) == (True, True)
    assert ledger.publish([*batch, delta(claim, 3, "!")]) == (True, True, True)
    texts = [event.text for event in events(redis_client, "a") if isinstance(event, OutputDelta)]
    assert texts == ["on", "ce", "!"]


def test_a_stale_fence_cannot_publish(ledger: Ledger, redis_client: redis.Redis) -> None:
    zombie, other = started(ledger, "a"), started(ledger, "b")
    lose(ledger, redis_client, "a")
    assert ledger.publish([delta(zombie, 1, "old"), delta(other, 1, "fine")]) == (False, True)
    live = claimed(ledger, "a", "worker-2")
    assert ledger.publish([delta(zombie, 2, "old"), delta(live, 1, "new")]) == (False, True)
    texts = [event.text for event in events(redis_client, "a") if isinstance(event, OutputDelta)]
    assert texts == ["new"]


def test_publishing_nothing_is_nothing(ledger: Ledger) -> None:
    assert ledger.publish([]) == ()


# finish


def test_finished_job_has_result_event_and_expiries(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    body = answer(claim, ODD_TEXT)
    assert ledger.finish("a", claim.fence, body) is Finished.DONE
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.result, view.error) == (JobStatus.COMPLETED, body.result, None)
    assert view.finished_at is not None
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobCompleted)
    assert last.result == body.result
    assert depth(redis_client) == 0
    assert redis_client.zcard(names.DUE_KEY) == 0
    ttls = {key: redis_client.ttl(key) for key in redis_client.scan_iter("*a") if not key.endswith("fence")}
    assert ttls[names.job_key("a")] == pytest.approx(86_400, abs=60)
    assert ttls[names.result_key("a")] == pytest.approx(86_400, abs=60)
    assert ttls[names.events_key("a")] == pytest.approx(3_600, abs=60)


def test_finishing_twice_is_already_done_and_changes_nothing(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    ledger.finish("a", claim.fence, answer(claim))
    assert ledger.finish("a", claim.fence, failure()) is Finished.ALREADY
    assert event_types(redis_client, "a") == ["job.queued", "job.started", "job.completed"]
    assert depth(redis_client) == 0


def test_a_stale_fence_cannot_finish(ledger: Ledger, redis_client: redis.Redis) -> None:
    zombie = started(ledger, "a")
    lose(ledger, redis_client, "a")
    assert ledger.finish("a", zombie.fence, answer(zombie)) is Finished.LOST  # queued again
    live = claimed(ledger, "a", "worker-2")
    assert ledger.finish("a", zombie.fence, answer(zombie)) is Finished.LOST  # running elsewhere
    ledger.finish("a", live.fence, answer(live, "live"))
    assert ledger.finish("a", zombie.fence, answer(zombie)) is Finished.LOST  # finished elsewhere
    view = ledger.view("a")
    assert view is not None
    assert view.result is not None
    assert view.result.text == "live"


def test_a_job_that_the_reaper_ended_is_lost_to_its_worker(connect: Connect, redis_client: redis.Redis) -> None:
    ledger = connect(LedgerConfig(max_attempts=1))
    claim = started(ledger, "a")
    lose(ledger, redis_client, "a")
    assert ledger.finish("a", claim.fence, answer(claim)) is Finished.LOST
    assert ledger.finish("nobody", 1, failure()) is Finished.LOST


def test_worker_can_end_a_cancelled_job_with_what_it_has(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    ledger.cancel("a")
    error = ErrorInfo.of(ErrorCode.CANCELLED, "cancelled")
    assert ledger.finish("a", claim.fence, CancelledBody(error=error, partial_text="re")) is Finished.DONE
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.cancelling, view.partial_text) == (JobStatus.CANCELLED, False, "re")
    assert json.loads(redis_client.get(names.result_key("a")) or "")["status"] == "REVOKED"


# give back


def test_given_back_job_is_rung_at_once_and_keeps_its_losses(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    assert ledger.give_back("a", claim.fence, RetryReason.GIVEN_BACK)
    retrying = events(redis_client, "a")[-1]
    assert isinstance(retrying, JobRetrying)
    assert (retrying.reason, retrying.attempt) == (RetryReason.GIVEN_BACK, 1)
    assert [bell.job_id for bell in ledger.reap()] == ["a"]
    assert ledger.reap() == ()
    assert claimed(ledger, "a").attempt == 2
    assert redis_client.hget(names.job_key("a"), "losses") == "0"
    assert depth(redis_client) == 1


def test_given_back_job_waits_out_its_delay(ledger: Ledger) -> None:
    claim = started(ledger, "a")
    ledger.give_back("a", claim.fence, RetryReason.STORAGE, delay_s=60)
    assert ledger.reap() == ()
    assert ledger.claim("a", "worker-2") == Refusal(RefusalReason.BUSY)


def test_delay_ends_by_redis_clock(ledger: Ledger) -> None:
    claim = started(ledger, "a")
    ledger.give_back("a", claim.fence, RetryReason.STORAGE, delay_s=0.05)
    eventually(lambda: ledger.reap(), what="the reaper rings after the delay")
    assert claimed(ledger, "a").attempt == 2


def test_only_the_owner_gives_back(ledger: Ledger) -> None:
    claim = started(ledger, "a")
    assert not ledger.give_back("a", claim.fence + 1, RetryReason.GIVEN_BACK)
    assert ledger.give_back("a", claim.fence, RetryReason.GIVEN_BACK)
    assert not ledger.give_back("a", claim.fence, RetryReason.GIVEN_BACK)
    assert not ledger.give_back("nobody", 1, RetryReason.GIVEN_BACK)


def test_given_back_job_that_was_asked_to_stop_is_cancelled(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    prefill = Publication("a", claim.fence, 1, ProgressBody(stage=Stage.PREFILL, done=0, total=17))
    ledger.publish([prefill, delta(claim, 2, "re", num_tokens=2)])
    ledger.cancel("a")
    assert ledger.give_back("a", claim.fence, RetryReason.GIVEN_BACK)
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobCancelled)
    assert (last.partial_text, last.usage.completion_tokens, last.usage.prompt_tokens) == ("re", 2, 17)
    assert depth(redis_client) == 0


# cancel


def test_cancelling_a_queued_job_ends_it_at_once(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    assert ledger.cancel("a") is Cancelled.CANCELLED
    assert ledger.cancel("a") is Cancelled.FINAL
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobCancelled)
    assert (last.error.code, last.partial_text) == (ErrorCode.CANCELLED, "")
    assert redis_client.zcard(names.waiting_key(names.list_id("default", 6))) == 0
    assert depth(redis_client) == 0


def test_cancelling_a_running_job_flags_it_and_tells_the_workers(ledger: Ledger, redis_client: redis.Redis) -> None:
    claim = started(ledger, "a")
    with redis_client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(names.CANCEL_CHANNEL)
        channel.get_message(timeout=5)
        assert ledger.cancel("a") is Cancelled.CANCELLING
        heard = channel.get_message(timeout=5)
    assert heard is not None
    assert heard["data"] == "a"
    view = ledger.view("a")
    assert view is not None
    assert (view.status, view.cancelling) == (JobStatus.IN_PROGRESS, True)
    ledger.finish("a", claim.fence, answer(claim))  # the answer was faster
    assert ledger.cancel("a") is Cancelled.FINAL


def test_cancelling_an_unknown_job_says_so(ledger: Ledger) -> None:
    assert ledger.cancel("nobody") is Cancelled.UNKNOWN
    assert ledger.view("nobody") is None


def test_expired_job_tells_its_deadline(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question(deadline_s=0.25))
    redis_client.hset(names.job_key("a"), mapping={"created": "10.0", "deadline": "10.25"})
    ledger.claim("a", "worker-1")
    last = events(redis_client, "a")[-1]
    assert isinstance(last, JobExpired)
    assert last.error.code is ErrorCode.EXPIRED
    assert last.error.retryable
    assert last.error.message == "deadline_s: 0.25 s passed while the job was queued"


def test_a_job_and_its_doorbell_are_written_in_one_step(ledger: Ledger, redis_client: redis.Redis) -> None:
    """Whoever dies meanwhile, neither exists without the other; a held job gets its doorbell later."""
    with redis_client.monitor() as monitor:
        ledger.submit("a", question())
        commands = []
        for heard in monitor.listen():
            commands.append(heard)
            if heard["command"].startswith("LPUSH"):
                break
    assert all(heard["client_type"] == "lua" for heard in commands if heard["command"].startswith(("HSET", "LPUSH")))
    assert doorbells_in(redis_client) == ["a"]
    ledger.submit("a", question())
    assert doorbells_in(redis_client) == ["a"]


def test_a_fence_is_never_given_again_whatever_redis_forgets(ledger: Ledger, redis_client: redis.Redis) -> None:
    """A replica without its master's last writes is promoted: the job is queued again, the counter stands back."""
    ledger.submit("a", question())
    old = claimed(ledger, "a", "worker-1")
    assert ledger.publish([delta(old, 1, "old ")]) == (True,)
    redis_client.decr(names.FENCE_KEY)
    redis_client.hset(names.job_key("a"), mapping={"status": "queued", "attempt": 0})
    new = claimed(ledger, "a", "worker-2")
    assert new.fence != old.fence
    assert ledger.publish([delta(old, 2, "mixed in")]) == (False,)
    assert ledger.beat("worker-1", "default", [("a", old.fence)]) == (Hold.LOST,)
    assert not ledger.give_back("a", old.fence, RetryReason.GIVEN_BACK)
    assert ledger.finish("a", old.fence, answer(old)) is Finished.LOST
    assert ledger.finish("a", new.fence, answer(new)) is Finished.DONE
    assert ledger.finish("a", old.fence, answer(old)) is Finished.LOST


def test_later_claims_have_greater_fences(ledger: Ledger) -> None:
    fences = [started(ledger, f"job-{number}").fence for number in range(20)]
    assert fences == sorted(set(fences))
