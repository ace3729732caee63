"""What errors of kombu mean."""

from __future__ import annotations

import pytest
import redis
from kombu import Connection, exceptions
from kombu.exceptions import DecodeError, InconsistencyError, OperationalError

from api_stub.ledger.verdicts import Verdict
from tests.servers import RedisServer, free_port
from worker.broker.transport import CLASSES, is_of_connection, judge


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
