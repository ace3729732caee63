"""Connection errors say what happened, at which host and port, and what Redis said; never a credential."""

from __future__ import annotations

import asyncio
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from api_stub.client.client import AsyncClient, Client
from api_stub.errors import StoreUnavailable, WrongEventLoop
from tests.gateway.service import serving
from tests.servers import RedisServer, free_port
from tests.unit.api_stub.workers import ScriptedWorker

SECRET = "s3cret-word"


def refusals_of(url: str) -> list[str]:
    """What a client says of a server to which it cannot submit, whose jobs it cannot follow, in both ways."""

    async def asynchronous() -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(StoreUnavailable) as refused:
                await client.vqa(question="Why?")
            said.append(str(refused.value))
            with pytest.raises(StoreUnavailable) as refused:
                await client.job("a-job").result(timeout=0.1)
            said.append(str(refused.value))

    said: list[str] = []
    with Client(url) as client:
        for call in (
            lambda: client.vqa(question="Why?"),
            lambda: client.job("a-job").result(timeout=0.1),
            client.job("a-job").status,
        ):
            with pytest.raises(StoreUnavailable) as refused:
                call()
            said.append(str(refused.value))
        with pytest.raises(StoreUnavailable) as refused:
            next(client.job("a-job").events(timeout=0.1))
        said.append(str(refused.value))
    asyncio.run(asynchronous())
    assert not any(SECRET in text for text in said)
    return said


@pytest.fixture
def untalkative() -> Iterator[int]:
    """The port of a server that answers whatever it is told with something that is no TLS."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(b"-ERR unknown command\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield int(server.server_address[1])
        server.shutdown()


@pytest.mark.parametrize("scheme", ["rediss", "https"])
def test_a_server_that_speaks_no_tls_is_named_as_that(untalkative: int, scheme: str) -> None:
    for said in refusals_of(f"{scheme}://127.0.0.1:{untalkative}"):
        assert said.endswith(f"TLS: wrong version number (127.0.0.1:{untalkative})")


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis whose two connections are taken."""
    server = RedisServer(tmp_path, "--maxclients", "2")
    guests = [redis.Redis(port=server.port, single_connection_client=True) for _ in range(2)]
    try:
        for guest in guests:
            guest.ping()
        yield server
    finally:
        for guest in guests:
            guest.close()
        server.stop()


def test_a_redis_without_room_for_a_connection_is_quoted(crowded: RedisServer) -> None:
    for text in refusals_of(crowded.url):
        assert "max number of clients reached" in text
        assert f"(127.0.0.1:{crowded.port})" in text


@pytest.mark.parametrize("scheme", ["redis", "http"])
def test_a_port_where_nobody_listens_is_named(scheme: str) -> None:
    port = free_port()
    for text in refusals_of(f"{scheme}://user:{SECRET}@127.0.0.1:{port}"):
        assert text.endswith(f"Connection refused (127.0.0.1:{port})")


@pytest.mark.parametrize(("scheme", "port"), [("redis", 6379), ("http", 80), ("https", 443)])
def test_a_name_without_an_address_is_named(scheme: str, port: int) -> None:
    for text in refusals_of(f"{scheme}://user:{SECRET}@nowhere.invalid"):
        assert re.search(rf"name .*\(nowhere\.invalid:{port}\)$", text, re.IGNORECASE), text


def test_a_redis_that_says_nothing_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        port = listener.getsockname()[1]
        with Client(f"redis://user:{SECRET}@127.0.0.1:{port}/0") as client, pytest.raises(StoreUnavailable) as refused:
            client.job("a-job").status()
    assert str(refused.value).endswith(f"Timeout reading (127.0.0.1:{port})")


def test_a_wrong_password_is_no_part_of_the_message(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    redis_client.acl_setuser("guarded", enabled=True, passwords=["+another"], categories=["+@all"])
    try:
        for text in refusals_of(redis_server.url.replace("redis://", f"redis://guarded:{SECRET}@")):
            assert "invalid username-password pair" in text
            assert f":{redis_server.port})" in text
    finally:
        redis_client.acl_deluser("guarded")


def test_a_gateway_tells_its_callers_why_and_its_log_where(
    crowded: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(crowded.url) as service:
        for answer in (
            service.http.get("/v1/jobs"),
            service.http.post("/v1/jobs", json={"task": "visionq.vqa", "question": "?"}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert "max number of clients reached" in answer.json()["detail"]
            assert str(crowded.port) not in answer.text
        assert service.http.get("/readyz").status_code == 503
    reasons = [str(getattr(record, "reason", "")) for record in caplog.records]
    assert any(f"max number of clients reached (127.0.0.1:{crowded.port})" in reason for reason in reasons)


@pytest.mark.parametrize("is_gateway", [False, True])
def test_an_async_client_on_a_second_event_loop_says_so(
    redis_url: str, worker: ScriptedWorker, is_gateway: bool
) -> None:
    async def ask(client: AsyncClient) -> str:
        return (await client.vqa(question="Why?")).id

    def use_twice(url: str) -> None:
        client = AsyncClient(url)
        first = asyncio.new_event_loop()
        try:
            job_id = first.run_until_complete(ask(client))
            for use in (
                ask(client),
                client.job(job_id).result(),
                client.job(job_id).status(),
                anext(client.job(job_id).events()),
                client.close(),
            ):
                with pytest.raises(WrongEventLoop, match="one AsyncClient per event loop"):
                    asyncio.run(_awaited(use))
            first.run_until_complete(ask(client))
            first.run_until_complete(client.close())
        finally:
            first.close()

    if is_gateway:
        with serving(redis_url) as service:
            use_twice(service.url)
    else:
        use_twice(redis_url)


async def _awaited(use: object) -> object:
    return await use  # type: ignore[misc]
