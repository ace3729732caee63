"""What a worker holds: a plain message in Redis as well, the only copy of its job; a doorbell in memory."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Queue
from pydantic import SecretStr

from api_stub.contract import names
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.servers import free_port
from tests.unit.api_stub.ledger_kit import question
from worker.broker.app import make_app
from worker.settings import WorkerSettings

QUEUE = names.queue("default")


class Receiver:
    """A connection that takes messages of the queue and answers none."""

    def __init__(self, url: str) -> None:
        self.unanswered: list[str] = []
        self.messages: list[Any] = []
        self._app = make_app(WorkerSettings(redis_url=SecretStr(url)), on_unanswered=self._note)
        self.connection: Connection = self._app.connection_for_read()
        self.consumer = Consumer(self.connection, [Queue(QUEUE)], on_message=self.messages.append)
        self.consumer.consume()

    def _note(self, job_ids: Sequence[str]) -> None:
        self.unanswered.extend(job_ids)

    @property
    def channel(self) -> Any:
        return self.consumer.channel

    def turn(self) -> None:
        with suppress(TimeoutError):
            self.connection.drain_events(timeout=0.05)

    def take(self) -> Any:
        """Turn the broker's loop until a message has come."""
        num = len(self.messages)
        ends = time.monotonic() + 20
        while len(self.messages) == num and time.monotonic() < ends:
            self.turn()
        return self.messages[num]

    def lead_to(self, port: int) -> int:
        """Have new connections go to another port; return the former one."""
        pool = self.channel.pool
        former: int = pool.connection_kwargs["port"]
        pool.connection_kwargs["port"] = port
        pool.reset()
        return former

    def close(self) -> None:
        self.connection.close()
        self._app.close()


@pytest.fixture
def receiver(redis_url: str, redis_client: redis.Redis) -> Iterator[Receiver]:
    receiver = Receiver(redis_url)
    yield receiver
    receiver.close()


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    ledger = Ledger.connect(redis_url, LedgerConfig())
    yield ledger
    ledger.close()


def plain(job_id: str) -> str:
    properties = {"delivery_tag": str(uuid.uuid4()), "delivery_info": {"exchange": "", "routing_key": QUEUE}}
    return json.dumps(
        {"body": '[[], {"question": "hello"}, {}]', "content-type": "application/json", "content-encoding": "utf-8",
         "headers": {"task": "visionq.vqa", "id": job_id}, "properties": properties | {"priority": 0}}
    )  # fmt: skip


def num_noted(client: redis.Redis) -> tuple[int, int]:
    return int(client.hlen("unacked")), int(client.zcard("unacked_index"))


def in_lists(client: redis.Redis) -> list[str]:
    keys = [names.queue_list("default", step) for step in names.PRIORITY_STEPS]
    return [json.loads(raw)["headers"]["id"] for key in keys for raw in client.lrange(key, 0, -1)]


def test_a_doorbell_leaves_nothing_in_redis(receiver: Receiver, ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    message = receiver.take()
    assert num_noted(redis_client) == (0, 0)
    message.ack()
    assert num_noted(redis_client) == (0, 0)
    receiver.close()
    assert (in_lists(redis_client), receiver.unanswered) == ([], []), "it was answered"


def test_doorbells_count_among_what_a_connection_may_hold(receiver: Receiver, ledger: Ledger) -> None:
    receiver.channel.basic_qos(0, 1, False)
    ledger.submit("a", question())
    receiver.take()
    assert not receiver.channel.qos.can_consume()
    receiver.messages[0].ack()
    assert receiver.channel.qos.can_consume()


def test_a_plain_message_is_noted_until_it_is_acknowledged(receiver: Receiver, redis_client: redis.Redis) -> None:
    redis_client.lpush(QUEUE, plain("a"))
    message = receiver.take()
    assert num_noted(redis_client) == (1, 1)
    message.ack()
    assert num_noted(redis_client) == (0, 0)


def test_a_lost_worker_s_plain_message_is_restored(
    receiver: Receiver, redis_client: redis.Redis, redis_url: str
) -> None:
    redis_client.lpush(QUEUE, plain("a"))
    receiver.take()
    (tag,) = redis_client.hkeys("unacked")
    redis_client.zadd("unacked_index", {tag: 1})  # it fell silent long ago
    other = Receiver(redis_url)
    other.channel.qos.restore_visible(num=10, interval=1)
    assert other.take().headers["id"] == "a"
    other.close()


def test_a_connection_that_closes_puts_plain_messages_back_and_leaves_doorbells(
    receiver: Receiver, ledger: Ledger, redis_client: redis.Redis
) -> None:
    ledger.submit("bell", question())
    receiver.take()
    redis_client.lpush(QUEUE, plain("plain"))
    receiver.take()
    receiver.close()
    assert in_lists(redis_client) == ["plain"]
    assert receiver.unanswered == ["bell"], "told once"
    assert num_noted(redis_client) == (0, 0)


def test_a_plain_message_that_cannot_be_put_back_yet_frees_its_place_and_goes_back_later(
    receiver: Receiver, redis_client: redis.Redis
) -> None:
    receiver.channel.basic_qos(0, 1, False)
    redis_client.lpush(QUEUE, plain("a"))
    message = receiver.take()
    redis_client.config_set("maxmemory", 1)
    try:
        message.reject(requeue=True)
        assert receiver.channel.qos.can_consume(), "a full Redis costs the worker no slot"
        receiver.channel.qos.restore_visible(num=10, interval=1)
        assert num_noted(redis_client) == (1, 1), "still refused, still noted"
    finally:
        redis_client.config_set("maxmemory", 0)
    receiver.channel.qos.restore_visible(num=10, interval=1)
    assert (in_lists(redis_client), num_noted(redis_client)) == (["a"], (0, 0))


@pytest.mark.parametrize("how", ["ack", "reject"])
def test_a_redis_that_is_away_costs_a_worker_no_slot(receiver: Receiver, redis_client: redis.Redis, how: str) -> None:
    receiver.channel.basic_qos(0, 1, False)
    redis_client.lpush(QUEUE, plain("a"))
    message = receiver.take()
    there = receiver.lead_to(free_port())
    message.ack() if how == "ack" else message.reject(requeue=True)
    assert receiver.channel.qos.can_consume()
    receiver.lead_to(there)
    receiver.channel.qos.restore_visible(num=10, interval=1)
    assert in_lists(redis_client) == ([] if how == "ack" else ["a"])


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_what_comes_after_the_last_turn_goes_back_at_once(
    kind: str, receiver: Receiver, ledger: Ledger, redis_client: redis.Redis
) -> None:
    receiver.turn()  # a BRPOP is on its way
    if kind == "doorbell":
        ledger.submit("a", question())
    else:
        redis_client.lpush(QUEUE, plain("a"))
    receiver.channel.stop_receiving()
    assert (in_lists(redis_client), receiver.unanswered) == (([], ["a"]) if kind == "doorbell" else (["a"], []))
    assert receiver.messages == []
    receiver.turn()
    assert receiver.messages == [], "nothing is asked for any more"


def test_a_worker_that_receives_nothing_stops_within_moments(receiver: Receiver) -> None:
    receiver.turn()
    receiver.channel.stop_receiving()
    receiver.channel.stop_receiving()
    assert receiver.unanswered == []
