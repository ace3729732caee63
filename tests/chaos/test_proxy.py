"""The proxy breaks connections in the ways that it promises, and in no other."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chaos.proxy import BOTH_WAYS, Network, TcpProxy, Way
from tests.servers import RedisServer, eventually


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[TcpProxy]:
    with Network() as network:
        yield network.proxy(redis_server.port)


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[redis.Redis]:
    """One connection through the proxy that is neither retried nor replaced silently."""
    with redis.Redis.from_url(
        proxy.url, decode_responses=True, socket_timeout=0.3, single_connection_client=True, retry=Retry(NoBackoff(), 0)
    ) as client:
        client.delete("asked")
        yield client


def asked(client: redis.Redis) -> object:
    return client.incr("asked")


def test_everything_passes(client: redis.Redis) -> None:
    assert asked(client) == 1
    client.set("large", "x" * 1_000_000)
    assert client.strlen("large") == 1_000_000


def test_a_reset_is_seen_at_once_and_a_new_connection_works(proxy: TcpProxy, client: redis.Redis) -> None:
    asked(client)
    proxy.reset()
    with pytest.raises(redis.ConnectionError):
        asked(client)
    assert asked(client) == 2


@pytest.mark.parametrize(
    ("ways", "is_done"),
    [(frozenset({Way.REQUESTS}), False), (frozenset({Way.REPLIES}), True), (BOTH_WAYS, False)],
    ids=["requests", "replies", "both"],
)
def test_a_cut_swallows_its_ways_and_new_connections_work_afterwards(
    proxy: TcpProxy, client: redis.Redis, redis_server: RedisServer, ways: frozenset[Way], is_done: bool
) -> None:
    asked(client)
    proxy.cut(ways)
    with pytest.raises(redis.TimeoutError):
        asked(client)
    with redis_server.client() as direct:
        assert direct.get("asked") == ("2" if is_done else "1")
    proxy.heal()
    assert asked(client) == (3 if is_done else 2)


def test_a_connection_that_lost_bytes_stays_dead(proxy: TcpProxy, redis_server: RedisServer) -> None:
    with redis.Redis.from_url(proxy.url, socket_timeout=5) as client:
        listener = client.pubsub(ignore_subscribe_messages=True)
        listener.subscribe("news")
        assert listener.get_message(timeout=2) is None
        with redis_server.client() as direct:
            proxy.cut(frozenset({Way.REPLIES}))
            assert direct.publish("news", "lost") == 1
            eventually(lambda: proxy.num_dead == 1, 5, "the proxy has swallowed the news")
            proxy.heal()
            assert direct.publish("news", "swallowed as well") == 1
        assert listener.get_message(timeout=0.3) is None
        listener.close()


def test_a_delay_slows_and_loses_nothing(proxy: TcpProxy, client: redis.Redis) -> None:
    asked(client)
    proxy.delay(0.1)
    began = time.monotonic()
    assert asked(client) == 2
    assert time.monotonic() - began >= 0.2
    proxy.heal()
    assert asked(client) == 3


def test_the_server_forgets_clients_that_have_left(
    proxy: TcpProxy, client: redis.Redis, redis_server: RedisServer
) -> None:
    with redis_server.client() as direct:
        before = len(direct.client_list())
        asked(client)
        client.close()
        eventually(lambda: len(direct.client_list()) <= before, what="the proxy hangs up")
