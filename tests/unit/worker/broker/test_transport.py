"""The guarded transport: whatever comes off a queue counts as received, and what the errors of kombu mean."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis
from kombu import Connection, Consumer, Queue, exceptions
from kombu.exceptions import DecodeError, InconsistencyError, OperationalError
from pydantic import SecretStr

from api_stub.contract import names
from api_stub.ledger.verdicts import Verdict
from tests.chaos.proxy import Network
from tests.servers import RedisServer, free_port
from worker.broker.app import make_app
from worker.broker.transport import CLASSES, is_of_connection, judge
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.watchdog import QueueWatch
from worker.settings import WorkerSettings


@pytest.fixture
def consumption() -> Consumption:
    return Consumption(2)


@pytest.fixture
def connection(redis_url: str, consumption: Consumption) -> Iterator[Connection]:
    app = make_app(WorkerSettings(redis_url=SecretStr(redis_url)), consumption.received)
    with app.connection_for_read() as connection:
        yield connection
    app.close()


def envelope(**properties: object) -> str:
    tag = {"delivery_tag": str(uuid.uuid4()), "delivery_info": {"exchange": "", "routing_key": "visionq.default"}}
    return json.dumps(
        {"body": "[[], {}, {}]", "content-type": "application/json", "content-encoding": "utf-8",
         "headers": {"task": "no.such", "id": "x"}, "properties": tag | properties}
    )  # fmt: skip


def test_a_flood_of_junk_does_not_make_a_worker_look_mute(
    redis_client: redis.Redis, connection: Connection, consumption: Consumption
) -> None:
    junk = ["no JSON", "{}", "[1, 2]", envelope(), envelope(delivery_info=None)]
    watch = QueueWatch(consumption, lambda: len(junk), mute_s=3)
    with Consumer(connection, [Queue(names.queue("default"))], on_message=lambda message: message.reject()):
        for now, entry in enumerate(junk):
            redis_client.lpush(names.queue("default"), entry)
            read(connection, consumption)
            assert watch.look(float(now)) is None
    found = [watch.look(float(now)) for now in range(5, 10)][-1]
    assert found is not None, "without signs of life it is"


def test_a_receiver_follows_the_name_away_from_a_server_that_became_a_replica(tmp_path: Path) -> None:
    """The old server stays up, and so do its connections."""
    consumption = Consumption(2)
    with ExitStack() as stack:
        servers = []
        for name in ("old", "new"):
            (tmp_path / name).mkdir()
            servers.append(RedisServer(tmp_path / name))
            stack.callback(servers[-1].kill)
        old, new = servers
        proxy = stack.enter_context(Network()).proxy(old.port)
        app = make_app(WorkerSettings(redis_url=SecretStr(proxy.url)), consumption.received)
        stack.callback(app.close)
        clients = [stack.enter_context(server.client()) for server in servers]
        connection = stack.enter_context(app.connection_for_read())
        queue = Queue(names.queue("default"))
        stack.enter_context(Consumer(connection, [queue], on_message=lambda message: message.ack()))
        clients[0].lpush(names.queue("default"), envelope())
        read(connection, consumption)
        proxy.lead_to(new.port)
        clients[0].execute_command("REPLICAOF", "127.0.0.1", new.port)
        clients[1].lpush(names.queue("default"), envelope())
        began = time.monotonic()
        read(connection, consumption)
        assert time.monotonic() - began < 10
        assert clients[1].hlen("unacked") == 0, "it is acknowledged there, too"


def read(connection: Connection, consumption: Consumption) -> None:
    """Turn the broker's loop until something has come."""
    before = consumption.num_signs
    for _ in range(100):
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.2)
        if consumption.num_signs > before:
            return
    raise AssertionError("nothing was read")


def test_every_class_of_kombu_has_a_verdict() -> None:
    found = [getattr(exceptions, name) for name in exceptions.__all__]
    by_base = [kind.__name__ for kind in found if isinstance(kind, type) and kind not in CLASSES]
    assert by_base == ["BatchPublishError"], "younger than the types of kombu that are at hand"


def test_what_kombu_wrapped_decides() -> None:
    with pytest.raises(OperationalError) as caught, Connection(f"redis://127.0.0.1:{free_port()}/0") as connection:
        connection.SimpleQueue("q").put("x", retry=True, retry_policy={"max_retries": 0})
    assert judge(caught.value) is Verdict.PASSING
    wrapped = OperationalError("denied")
    wrapped.__cause__ = redis.exceptions.NoPermissionError("denied", status_code="NOPERM")
    assert judge(wrapped) is Verdict.LASTING


def test_a_full_broker_passes(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    with Connection(redis_server.url) as connection:
        queue = connection.SimpleQueue("q")
        redis_client.config_set("maxmemory", 1)
        with pytest.raises(Exception, match="command not allowed") as caught:
            queue.put("x")
        redis_client.config_set("maxmemory", 0)
    assert judge(caught.value) is Verdict.PASSING


def test_an_error_of_a_message_is_none_of_the_connection() -> None:
    of_messages = (DecodeError(), ValueError(), KeyError(), MemoryError())
    of_connections = (OSError(), InconsistencyError(), redis.ResponseError())
    assert [is_of_connection(error) for error in of_messages] == [False] * 4
    assert [is_of_connection(error) for error in of_connections] == [True] * 3
