"""The ledger when Redis is restarted, full, silent or gone."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
import redis

from api_stub.contract.event import RetryReason
from api_stub.contract.status import JobStatus
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled, Finished, Hold
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.verdicts import code_of, is_passing
from tests.chaos.proxy import Network
from tests.servers import RedisServer, eventually, free_port
from tests.unit.api_stub.ledger_kit import answer, delta, event_types, events, lease_ends, question, started


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    with closing(Ledger.connect(redis_url, LedgerConfig())) as opened:
        yield opened


@pytest.fixture
def full_redis(redis_client: redis.Redis) -> Iterator[redis.Redis]:
    """Call `config_set("maxmemory", 1)` to fill it."""
    yield redis_client
    redis_client.config_set("maxmemory", 0)


def contents(client: redis.Redis) -> dict[str, object]:
    """Everything in Redis, whatever its encoding and order."""
    readers = {
        "string": client.get,
        "hash": client.hgetall,
        "set": client.smembers,
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "stream": client.xrange,
        "list": lambda key: client.lrange(key, 0, -1),
    }
    return {key: readers[client.type(key)](key) for key in client.scan_iter()}


def test_scripts_are_loaded_again_when_redis_forgot_them(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    redis_client.script_flush()
    ledger.submit("b", question())
    assert ledger.view("a") is not None


def test_connections_that_redis_closed_are_replaced_silently(ledger: Ledger, redis_client: redis.Redis) -> None:
    ledger.submit("a", question())
    redis_client.client_kill_filter(_type="normal", skipme=True)
    assert ledger.view("a") is not None


def test_a_restarted_redis_knows_every_job(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--appendfsync", "always")
    with closing(Ledger.connect(server.url, LedgerConfig())) as ledger:
        claim = started(ledger, "a")
        ledger.publish([delta(claim, 1, "re")])
        server.kill()
        with pytest.raises(redis.ConnectionError):
            ledger.view("a")
        server.start()
        assert ledger.beat("worker-1", "default", [("a", claim.fence)]) == (Hold.HELD,)
        assert ledger.finish("a", claim.fence, answer(claim)) is Finished.DONE
        with server.client() as client:
            assert event_types(client, "a") == ["job.queued", "job.started", "output.delta", "job.completed"]
    server.stop()


@pytest.mark.parametrize("is_restarted", [True, False], ids=["restarted", "unreachable"])
def test_workers_outlive_outages_longer_than_their_lease(tmp_path: Path, is_restarted: bool) -> None:
    server = RedisServer(tmp_path, "--appendfsync", "always")
    with closing(Ledger.connect(server.url, LedgerConfig(lease_s=0.4, max_attempts=1), timeout_s=0.5)) as ledger:
        claim = started(ledger, "a")
        for _ in range(2):
            assert ledger.beat("worker-1", "default", [("a", claim.fence)]) == (Hold.HELD,)
            with away(server, 0.6, is_restarted=is_restarted), pytest.raises(redis.RedisError):
                ledger.reap()
            assert ledger.reap() == ()
        assert ledger.finish("a", claim.fence, answer(claim)) is Finished.DONE
        started(ledger, "b")
        with away(server, 0.6, is_restarted=is_restarted):
            pass
        eventually(lambda: ledger.reap() or is_final(ledger, "b"), 5, what="a silent worker is still lost")
    server.stop()


@contextmanager
def away(server: RedisServer, outage_s: float, *, is_restarted: bool) -> Iterator[None]:
    """Redis is away for so long: killed and started from its file, or frozen."""
    over = time.monotonic() + outage_s
    assert server.process is not None
    server.kill() if is_restarted else server.process.send_signal(signal.SIGSTOP)
    try:
        yield
        eventually(lambda: time.monotonic() > over)
    finally:
        server.start() if is_restarted else server.process.send_signal(signal.SIGCONT)


def is_final(ledger: Ledger, job_id: str) -> bool:
    view = ledger.view(job_id)
    return view is not None and view.status.is_final


def test_silent_redis_is_an_error_within_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with closing(Ledger.connect(url, LedgerConfig(), timeout_s=0.2)) as ledger:
            began = time.monotonic()
            with pytest.raises(redis.TimeoutError):
                ledger.submit("a", question())
            assert time.monotonic() - began < 5


def test_absent_redis_is_an_error_at_once() -> None:
    with closing(Ledger.connect(f"redis://127.0.0.1:{free_port()}/0", LedgerConfig())) as ledger:
        began = time.monotonic()
        with pytest.raises(redis.ConnectionError):
            ledger.submit("a", question())
        assert time.monotonic() - began < 2


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A name, and how to move it: the old server stays up as a replica, and so do its connections."""
    with ExitStack() as stack:
        servers = []
        for name in ("old", "new"):
            (tmp_path / name).mkdir()
            servers.append(RedisServer(tmp_path / name))
            stack.callback(servers[-1].kill)
        old, new = servers
        proxy = stack.enter_context(Network()).proxy(old.port)

        def move() -> None:
            proxy.lead_to(new.port)
            with old.client() as client:
                client.execute_command("REPLICAOF", "127.0.0.1", new.port)

        yield proxy.url, move


def test_a_ledger_follows_the_name_away_from_a_server_that_became_a_replica(
    moving: tuple[str, Callable[[], None]],
) -> None:
    url, move = moving
    with closing(Ledger.connect(url, LedgerConfig())) as ledger:
        with ThreadPoolExecutor(4) as pool:  # several connections
            list(pool.map(lambda i: ledger.submit(f"before-{i}", question()), range(20)))
        move()
        with pytest.raises(redis.RedisError) as caught:
            ledger.submit("after", question())
        assert is_passing(caught.value)
        for i in range(8):
            assert ledger.submit(f"after-{i}", question()) is not None


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[AsyncLedger]:
    ledger = AsyncLedger.connect(url, LedgerConfig())
    yield ledger
    await ledger.close()


def test_an_async_ledger_follows_the_name_too(moving: tuple[str, Callable[[], None]]) -> None:
    url, move = moving

    async def use() -> None:
        async with connected(url) as ledger:
            await asyncio.gather(*(ledger.submit(f"before-{i}", question()) for i in range(4)))
            move()
            with pytest.raises(redis.RedisError) as caught:
                await ledger.submit("after", question())
            assert is_passing(caught.value)
            await asyncio.gather(*(ledger.submit(f"after-{i}", question()) for i in range(4)))

    asyncio.run(use())


def test_full_redis_refuses_new_work_whole(ledger: Ledger, full_redis: redis.Redis) -> None:
    ledger.submit("waiting", question())
    claim = started(ledger, "running")
    before = contents(full_redis)
    full_redis.config_set("maxmemory", 1)
    for attempt in (
        lambda: ledger.submit("new", question()),
        lambda: ledger.claim("waiting", "worker-1"),
        lambda: ledger.publish([delta(claim, 1, "re")]),
    ):
        with pytest.raises(redis.ResponseError) as caught:
            attempt()
        assert (code_of(caught.value), is_passing(caught.value)) == ("OOM", True)
    full_redis.config_set("maxmemory", 0)
    assert contents(full_redis) == before


def test_full_redis_still_cancels_running_and_queued_jobs(ledger: Ledger, full_redis: redis.Redis) -> None:
    running = started(ledger, "running")
    ledger.submit("queued", question())
    full_redis.config_set("maxmemory", 1)
    assert ledger.cancel("running") is Cancelled.CANCELLING
    assert ledger.cancel("queued") is Cancelled.CANCELLED
    assert ledger.beat("worker-1", "default", [("running", running.fence)]) == (Hold.CANCEL,)
    assert ledger.give_back("running", running.fence, RetryReason.GIVEN_BACK)
    assert is_final(ledger, "running")
    assert is_final(ledger, "queued")
    assert ledger.reap() == ()
    ledger.leave("worker-1", "default")


def test_full_redis_still_sweeps_when_nothing_is_due(ledger: Ledger, full_redis: redis.Redis) -> None:
    full_redis.config_set("maxmemory", 1)
    assert ledger.reap() == ()


def test_full_redis_still_lets_running_jobs_live_and_end(ledger: Ledger, full_redis: redis.Redis) -> None:
    finished, given_back, lost = (started(ledger, job_id) for job_id in ("a", "b", "c"))
    ledger.submit("queued", question())
    lease_ends(full_redis, "c")
    full_redis.config_set("maxmemory", 1)
    assert ledger.beat("worker-1", "default", [("a", finished.fence)]) == (Hold.HELD,)
    assert ledger.finish("a", finished.fence, answer(finished)) is Finished.DONE
    assert ledger.give_back("b", given_back.fence, RetryReason.GIVEN_BACK)
    ledger.cancel("queued")
    assert {bell.job_id for bell in ledger.reap()} == {"b", "c"}
    full_redis.config_set("maxmemory", 0)
    assert ledger.finish("c", lost.fence, answer(lost)) is Finished.LOST
    for job_id, status in (("a", JobStatus.COMPLETED), ("b", JobStatus.QUEUED), ("queued", JobStatus.CANCELLED)):
        view = ledger.view(job_id)
        assert view is not None
        assert view.status is status
        assert events(full_redis, job_id)
