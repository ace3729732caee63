"""Whose job is next: tenants in turn, caps, ageing, and doorbells that the ledger rings itself. On a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import pairwise

import pytest
import redis
from celery import Celery

from api_stub.contract import names
from api_stub.contract.event import RetryReason
from api_stub.contract.job import TaskName
from api_stub.contract.status import JobStatus
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled, Claim, LedgerFull, Refusal, RefusalReason, Submission
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.broker_kit import Broker, leftovers
from tests.unit.api_stub.ledger_kit import event_types, lease_ends, question

Connect = Callable[[LedgerConfig], Broker]
WINDOW = LedgerConfig().window
LIST = names.list_id("default", 6)


@pytest.fixture
def connect(redis_url: str) -> Iterator[Connect]:
    """Opens ledgers that are closed after the test."""
    with ExitStack() as opened:
        yield lambda config: Broker(opened.enter_context(closing(Ledger.connect(redis_url, config))))


@pytest.fixture
def broker(connect: Connect) -> Broker:
    return connect(LedgerConfig())


def num_messages(broker: Broker) -> int:
    return sum(broker.redis.llen(key) for key in broker.lists)


def statuses(broker: Broker, *job_ids: str) -> list[JobStatus]:
    views = [broker.ledger.view(job_id) for job_id in job_ids]
    return [view.status for view in views if view is not None]


# turns


def test_a_backlog_of_one_tenant_delays_another_by_a_few_turns_only(broker: Broker) -> None:
    for i in range(1000):
        broker.submit(f"big-{i}", question(tenant="big"))
    for i in range(10):
        broker.submit(f"small-{i}", question(tenant="small"))
    done = broker.work(60)
    smalls = [place for place, job_id in enumerate(done) if job_id.startswith("small")]
    assert len(smalls) == 10
    assert smalls[0] <= WINDOW + 2
    assert smalls[-1] <= WINDOW + 2 * 10 + 2
    assert [job_id for job_id in done if job_id.startswith("big")] == [f"big-{i}" for i in range(50)]


def test_jobs_without_a_tenant_take_turns_with_the_tenants(broker: Broker) -> None:
    for i in range(100):
        broker.submit(f"none-{i}", question())
    broker.submit("mine", question(tenant="me"))
    assert "mine" in broker.work(WINDOW + 3)


def test_a_backlog_is_held_and_every_job_of_it_is_served_in_order(broker: Broker, redis_client: redis.Redis) -> None:
    submissions = [broker.submit(f"job-{i}", question()) for i in range(50)]
    assert submissions == [Submission.CREATED] * WINDOW + [Submission.HELD] * (50 - WINDOW)
    assert broker.submit("job-49", question()) is Submission.HELD
    assert broker.submit("job-0", question()) is Submission.SAME
    assert num_messages(broker) == WINDOW
    assert redis_client.hgetall(names.NUM_HELD_KEY) == {LIST: str(50 - WINDOW)}
    assert redis_client.get(names.depth_key("default")) == "50"
    assert broker.work(99) == [f"job-{i}" for i in range(50)]
    broker.ledger.reap()
    assert leftovers(redis_client) == set()


def test_many_workers_widen_the_window(broker: Broker) -> None:
    for i in range(20):
        broker.ledger.beat(f"worker-{i}", "default", [])
    submissions = [broker.submit(f"job-{i}", question()) for i in range(50)]
    assert submissions.count(Submission.CREATED) == 40


def test_lost_doorbells_of_a_full_window_do_not_stop_the_others(broker: Broker, redis_client: redis.Redis) -> None:
    for i in range(3 * WINDOW):
        broker.submit(f"job-{i}", question())
    redis_client.delete(*broker.lists)  # the broker lost them all
    broker.ledger.reap()
    assert broker.work(99) == [f"job-{i}" for i in range(WINDOW, 3 * WINDOW)]
    for i in range(WINDOW):
        redis_client.hset(names.job_key(f"job-{i}"), "alarm", "1")
        redis_client.zadd(names.DUE_KEY, {f"job-{i}": i})
    broker.ledger.reap()
    assert broker.work(99) == [f"job-{i}" for i in range(WINDOW)]


def test_held_jobs_can_be_cancelled_and_expire(broker: Broker, redis_client: redis.Redis) -> None:
    for i in range(WINDOW):
        broker.submit(f"job-{i}", question())
    broker.submit("cancelled", question(tenant="a"))
    broker.submit("late", question(tenant="b", deadline_s=60))
    assert broker.ledger.cancel("cancelled") is Cancelled.CANCELLED
    redis_client.hset(names.job_key("late"), "deadline", "1")
    redis_client.zadd(names.DUE_KEY, {"late": 1})
    assert broker.ledger.reap() == ()
    assert statuses(broker, "cancelled", "late") == [JobStatus.CANCELLED, JobStatus.EXPIRED]
    assert not redis_client.exists(names.NUM_HELD_KEY, names.turns_key(LIST), names.held_key(LIST, "a"))
    assert len(broker.work(99)) == WINDOW
    assert leftovers(redis_client) == set()


def test_cancelling_a_rung_job_lets_a_held_one_in(broker: Broker) -> None:
    broker.ledger.loading("default")  # of a name that nobody serves the doorbell would go, too
    for i in range(WINDOW + 1):
        broker.submit(f"job-{i}", question())
    before = num_messages(broker)
    broker.ledger.cancel("job-0")
    assert num_messages(broker) == before + 1


def test_admission_limit_counts_held_jobs(connect: Connect) -> None:
    broker = connect(LedgerConfig(max_queued=WINDOW + 3))
    for i in range(WINDOW + 3):
        broker.submit(f"job-{i}", question())
    with pytest.raises(LedgerFull) as full:
        broker.submit("one more", question())
    assert full.value.retry_after_s > 0


def test_position_of_a_held_job_is_where_it_is_served(broker: Broker) -> None:
    for i in range(WINDOW + 30):
        broker.submit(f"a-{i}", question(tenant="a"))
    for i in range(3):
        broker.submit(f"b-{i}", question(tenant="b"))
    told = {}
    for page in broker.ledger.list_jobs("a", limit=100).jobs, broker.ledger.list_jobs("b").jobs:
        told |= {view.job_id: view.position for view in page}
    done = broker.work(99)
    assert len(done) == WINDOW + 33
    for job_id in ("a-0", f"a-{WINDOW - 1}", f"a-{WINDOW}", "b-0", "b-1", "b-2"):
        assert told[job_id] == pytest.approx(done.index(job_id), abs=1)
    last = told[f"a-{WINDOW + 29}"]  # with both lines as long as they are now it would be twice as far
    assert last is not None
    assert last <= WINDOW + 33


# caps


def test_a_tenant_at_its_cap_waits_and_the_others_go_on(connect: Connect, redis_client: redis.Redis) -> None:
    broker = connect(LedgerConfig(tenant_max_running=2))
    for i in range(20):
        broker.submit(f"big-{i}", question(tenant="big"))
    for i in range(3):
        broker.submit(f"small-{i}", question(tenant="small"))
    broker.submit("free", question())
    running = [claim for claim in iter(broker.claim_next, None) if claim is not None]
    assert sorted(claim.job_id for claim in running) == ["big-0", "big-1", "free", "small-0", "small-1"]
    assert redis_client.hgetall(names.tenants_key("default")) == {"big": "2", "small": "2"}
    broker.finish(next(claim for claim in running if claim.job_id == "big-0"))
    claim = broker.claim_next()
    assert claim is not None
    assert claim.job_id == "big-2"
    assert broker.claim_next() is None


def test_every_job_of_a_capped_tenant_is_served(connect: Connect, redis_client: redis.Redis) -> None:
    broker = connect(LedgerConfig(tenant_max_running=1))
    for i in range(30):
        broker.submit(f"job-{i}", question(tenant="t", priority=(0, 6, 9)[i % 3]))
    assert len(broker.work(99)) == 30
    broker.ledger.reap()
    assert leftovers(redis_client) == set()


def test_a_plain_message_above_the_cap_is_held_and_costs_no_attempt(
    connect: Connect, redis_client: redis.Redis
) -> None:
    broker = connect(LedgerConfig(tenant_max_running=1))
    job = question(tenant="t")
    for job_id in ("first", "second"):
        broker.ledger.adopt(job_id, task=TaskName.VQA, model="default", job=job, priority=6)
    first = broker.ledger.claim("first", "worker-1")
    assert isinstance(first, Claim)
    assert broker.ledger.claim("second", "worker-1") == Refusal(RefusalReason.HELD)
    assert broker.ledger.reap() == ()
    assert num_messages(broker) == 0
    broker.finish(first)
    second = broker.claim_next()
    assert second is not None
    assert (second.job_id, second.attempt) == ("second", 1)
    assert event_types(redis_client, "second") == ["job.queued", "job.started"]


@pytest.mark.parametrize("how", ["give_back", "lose"])
def test_a_job_that_stops_running_makes_room_for_its_tenant(connect: Connect, how: str) -> None:
    broker = connect(LedgerConfig(tenant_max_running=1))
    for job_id in ("a", "b"):
        broker.submit(job_id, question(tenant="t"))
    claim = broker.claim_next()
    assert claim is not None
    if how == "give_back":
        broker.ledger.give_back("a", claim.fence, RetryReason.STORAGE, delay_s=60)
    else:
        lease_ends(broker.redis, "a")
    broker.ledger.reap()
    assert sorted(broker.work(99)) == (["b"] if how == "give_back" else ["a", "b"])


def test_a_cap_that_only_the_workers_know_holds(connect: Connect) -> None:
    producer, worker = connect(LedgerConfig()), connect(LedgerConfig(tenant_max_running=1))
    for i in range(5):
        producer.submit(f"job-{i}", question(tenant="t"))
    first = worker.claim_next()
    assert first is not None
    assert worker.claim_next() is None
    worker.finish(first)
    assert len(worker.work(99)) == 4


# ageing


def test_the_last_priority_runs_under_a_steady_load_of_the_first(connect: Connect, redis_client: redis.Redis) -> None:
    broker = connect(LedgerConfig(ageing_s=5))
    for i in range(3):
        broker.submit(f"slow-{i}", question(priority=9))
        redis_client.hset(names.job_key(f"slow-{i}"), "queued_at", str(1 + i))  # long ago
    broker.submit("young", question(priority=9))
    done: list[str] = []
    for i in range(60):
        broker.submit(f"fast-{2 * i}", question(priority=0))
        broker.submit(f"fast-{2 * i + 1}", question(priority=0))  # twice what is served
        if i == 0:
            broker.ledger.beat("worker-1", "default", [])
        broker.ledger.reap()
        done += broker.work(1)
    slow = [place for place, job_id in enumerate(done) if job_id.startswith("slow")]
    assert len(slow) == 3
    assert "young" not in done
    assert min(b - a for a, b in pairwise(slow)) > WINDOW / 2  # urgent jobs keep most of the turns


def test_a_lost_doorbell_in_one_list_holds_nobody_back_in_another(connect: Connect, redis_client: redis.Redis) -> None:
    """The aged job is in the first list and its tenant's next one in the other; both are free in the same sweep."""
    broker = connect(LedgerConfig(ageing_s=5, tenant_max_running=1))
    for job_id in ("old", "next"):
        broker.submit(job_id, question(tenant="zoo"))
    redis_client.hset(names.job_key("old"), "queued_at", "1")
    broker.ledger.beat("worker-1", "default", [])
    broker.ledger.reap()
    redis_client.delete(*broker.lists)
    redis_client.zadd(names.NEWS_KEY, {"default:6": 1, "default:0": 2})
    broker.ledger.reap()
    assert redis_client.hexists(names.job_key("old"), "alarm")
    assert broker.receive() == "next"


def test_an_aged_jobs_second_doorbell_finds_it_done(connect: Connect, redis_client: redis.Redis) -> None:
    broker = connect(LedgerConfig(ageing_s=5))
    broker.submit("slow", question(priority=9))
    redis_client.hset(names.job_key("slow"), "queued_at", "1")
    broker.ledger.reap()
    assert num_messages(broker) == 1, "let in front although nobody serves"
    broker.ledger.beat("worker-1", "default", [])
    broker.ledger.reap()
    broker.ledger.reap()
    assert num_messages(broker) == 2
    assert broker.work(99) == ["slow"]
    assert num_messages(broker) == 0
    view = broker.ledger.view("slow")
    assert view is not None
    assert (view.priority, view.status) == (9, JobStatus.COMPLETED)


# the ledger's own doorbell


def test_the_ledgers_doorbell_is_the_message_that_celery_would_send(broker: Broker, redis_url: str) -> None:
    for i in range(WINDOW):
        broker.submit(f"job-{i}", question())
    odd_id = 'jöb "9" <id>%1'
    broker.submit(odd_id, question())
    broker.redis.delete(*broker.lists)
    broker.ledger.cancel("job-0")  # rings for the held one
    [raw] = broker.redis.lrange(broker.lists[2], 0, -1)
    ours = json.loads(raw)
    with Celery("producer", broker=redis_url, set_as_current=False) as app:
        app.conf.broker_transport_options = {"priority_steps": list(names.PRIORITY_STEPS)}
        app.send_task("visionq.vqa", task_id=odd_id, queue="visionq.default", priority=6, ignore_result=True)
    theirs = json.loads(broker.redis.lrange(broker.lists[2], 0, 0)[0])
    assert set(theirs) == set(ours)
    assert (ours["body"], ours["content-type"]) == (theirs["body"], theirs["content-type"])
    assert ours["headers"].pop(names.DOORBELL_HEADER) == 1
    assert ours["headers"].items() <= theirs["headers"].items()
    mine, other = ours["properties"], theirs["properties"]
    assert mine.pop("delivery_tag") != other.pop("delivery_tag")
    assert mine.items() <= other.items()


def test_a_celery_worker_can_read_the_ledgers_doorbell(broker: Broker, redis_url: str) -> None:
    for i in range(WINDOW + 1):
        broker.submit(f"job-{i}", question())
    broker.redis.delete(*broker.lists)
    broker.ledger.cancel("job-0")
    with Celery("consumer", broker=redis_url, set_as_current=False) as app, app.connection_for_read() as connection:
        connection.transport_options = {"priority_steps": list(names.PRIORITY_STEPS)}
        message = connection.SimpleQueue("visionq.default").get(timeout=10)
        assert (message.headers["id"], message.headers["task"]) == (f"job-{WINDOW}", "visionq.vqa")
        assert message.payload == [[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
        message.ack()


def test_a_row_that_was_taken_away_stops_no_sweep(broker: Broker, redis_client: redis.Redis) -> None:
    for job_id in ("gone", "next"):
        broker.submit(job_id, question())
    redis_client.delete(names.job_key("gone"))
    assert broker.ledger.reap() == ()
    assert broker.work(2)[-1] == "next"


def test_what_waits_without_a_row_is_forgotten(connect: Connect, redis_client: redis.Redis) -> None:
    broker = connect(LedgerConfig(tenant_max_running=2))
    for job_id, job in (("gone", question(tenant="zoo")), ("mine", question(tenant="zoo")), ("bare", question())):
        broker.submit(job_id, job)
    for job_id in ("gone", "bare"):
        redis_client.delete(names.job_key(job_id))
    redis_client.delete(*broker.lists)  # their doorbells are lost, so a sweep suspects all of them
    assert broker.ledger.reap() == ()
    assert not redis_client.exists(names.job_key("gone"), names.job_key("bare"))
    assert redis_client.hgetall(names.tenants_key("default")) == {}
    redis_client.hset(names.job_key("mine"), "alarm", "1")
    redis_client.zadd(names.DUE_KEY, {"mine": 1})
    broker.ledger.reap()
    assert broker.work(1) == ["mine"]
    assert (leftovers(redis_client), redis_client.get(names.depth_key("default"))) == (set(), "0")
    assert not redis_client.exists(*(names.events_key(job_id) for job_id in ("gone", "bare")))


def test_a_job_without_a_row_costs_its_tenant_no_place_although_others_come(
    connect: Connect, redis_client: redis.Redis
) -> None:
    broker = connect(LedgerConfig(tenant_max_running=2))
    broker.ledger.loading("default")
    for job_id in ("gone", "lost"):
        broker.submit(job_id, question(tenant="zoo"))
    redis_client.delete(*map(names.job_key, ("gone", "lost")), *broker.lists)
    broker.submit("mine", question(tenant="zoo"))
    broker.ledger.reap()
    broker.ledger.cancel("mine")
    broker.ledger.reap()
    assert redis_client.hgetall(names.tenants_key("default")) == {}
    assert redis_client.get(names.depth_key("default")) == "0"


def test_what_is_held_without_a_row_is_passed_over(broker: Broker, redis_client: redis.Redis) -> None:
    for i in range(WINDOW + 3):
        broker.submit(f"job-{i}", question(tenant="zoo"))
    gone = [f"job-{WINDOW}", f"job-{WINDOW + 1}"]
    redis_client.delete(*map(names.job_key, gone))
    done = broker.work(WINDOW + 3)
    assert (len(done), done[-1]) == (WINDOW + 1, f"job-{WINDOW + 2}")
    assert not redis_client.exists(*map(names.job_key, gone))
    assert (leftovers(redis_client), redis_client.get(names.depth_key("default"))) == (set(), "0")
