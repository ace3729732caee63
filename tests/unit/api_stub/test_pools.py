"""What a pool does while the name still leads to a server that has become a replica."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from api_stub.ledger import pools
from tests.failovers import NOBODY
from tests.servers import RedisServer, eventually

NUM_CONNECTIONS, NUM_ROUNDS = 4, 20
#: Each leaves the server once and may look in vain once more.
MAX_OPENED = 4 * NUM_CONNECTIONS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def master(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


def num_opened(client: redis.Redis) -> int:
    return int(client.info("stats")["total_connections_received"])


def test_connections_to_a_replica_do_not_drive_each_other_round(server: RedisServer, master: redis.Redis) -> None:
    with pools.client(server.url, timeout_s=20) as client:
        connections = [client.connection_pool.get_connection() for _ in range(NUM_CONNECTIONS)]

        def ask_all() -> None:
            for connection in connections:
                connection.send_command("GET", "nothing")
                connection.read_response()

        ask_all()
        master.replicaof("127.0.0.1", NOBODY)
        before = num_opened(master)
        for connection in connections:
            connection._look_at = 0.0
        for _ in range(NUM_ROUNDS):
            ask_all()
        assert num_opened(master) - before <= MAX_OPENED
        for connection in connections:
            client.connection_pool.release(connection)


def test_a_connection_looks_again_after_a_script_that_ran_for_too_long(
    server: RedisServer, master: redis.Redis
) -> None:
    master.config_set("lua-time-limit", 1)
    with server.client() as busy, pools.client(server.url, timeout_s=20) as client:
        connection = client.connection_pool.get_connection()
        connection.connect()
        script = threading.Thread(target=lambda: run_until_killed(busy))
        script.start()
        eventually(lambda: is_busy(master), what="the script runs for too long")
        connection.send_command("PING")
        with pytest.raises(redis.ResponseError):
            connection.read_response()
        assert connection._look_at < math.inf
        master.script_kill()
        script.join()
        client.connection_pool.release(connection)


def run_until_killed(client: redis.Redis) -> None:
    with suppress(redis.ResponseError):
        client.eval("while true do end", 0)


def is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError:
        return True
    return False


def test_nor_do_those_of_an_event_loop(server: RedisServer, master: redis.Redis) -> None:
    async def ask() -> int:
        client = pools.async_client(server.url, timeout_s=20)
        connections = [await client.connection_pool.get_connection() for _ in range(NUM_CONNECTIONS)]

        async def ask_all() -> None:
            for connection in connections:
                await connection.send_command("GET", "nothing")
                await connection.read_response()

        await ask_all()
        master.replicaof("127.0.0.1", NOBODY)
        before = num_opened(master)
        for connection in connections:
            connection._look_at = 0.0
        for _ in range(NUM_ROUNDS):
            await ask_all()
        opened = num_opened(master) - before
        for connection in connections:
            await client.connection_pool.release(connection)
        await client.aclose()
        return opened

    assert asyncio.run(ask()) <= MAX_OPENED
