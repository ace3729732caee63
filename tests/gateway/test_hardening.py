"""What a hostile or clumsy client cannot do: hold a request open, fill memory, leave something behind, read secrets."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import httpx
import pytest
import redis

from api_stub.gateway.keys import digest_of, new_key
from api_stub.gateway.middleware import SECURITY_HEADERS
from api_stub.ledger.aio import AsyncLedger
from tests.gateway.service import Service, serving
from tests.gateway.test_events import nobody_reads
from tests.gateway.test_jobs import QUESTION, submit
from tests.gateway.test_process import ApiProcess, Start, start
from tests.servers import RedisServer, eventually
from tests.unit.api_stub.workers import ScriptedWorker

__all__ = ["start"]

NUM_VISITS = 1000
#: The kernel takes some of a body that nobody reads.
MAX_TAKEN_BYTES = 32 * 1024 * 1024
#: More than is passed over.
MAX_BODY_BYTES = 256 * 1024
ORIGIN = "https://app.example"
KEY = new_key()
ALICE = {"Authorization": f"Bearer {KEY}"}
JSON = {"Content-Type": "application/json"}


def answer_of(connection: socket.socket) -> tuple[int, dict[str, object]]:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


@contextmanager
def begun_post(service: Service, path: str, num_bytes: int, first: bytes) -> Iterator[socket.socket]:
    """A request whose body has only begun."""
    with socket.create_connection(service.address, timeout=60) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {num_bytes}\r\n\r\n".encode()
        )
        connection.sendall(first)
        yield connection


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/uploads"])
def test_a_body_that_trickles_for_ever_is_ended(redis_url: str, path: str) -> None:
    with serving(redis_url, api_body_s=1.0) as running:
        with begun_post(running, path, 1000, b'{"task":') as connection:
            trickle = threading.Event()

            def drip() -> None:
                while not trickle.wait(0.1):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return

            dripping = threading.Thread(target=drip)
            dripping.start()
            try:
                status, problem = answer_of(connection)
            finally:
                trickle.set()
                dripping.join(20)
        assert (status, problem["code"]) == (408, "request_timeout")
        assert submit(running)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/uploads"])
def test_bodies_share_a_bound(redis_url: str, path: str) -> None:
    body = json.dumps(QUESTION | {"metadata": {"padding": "x" * 3000}}).encode()
    with serving(redis_url, api_max_bodies_bytes=10_000) as running:
        with begun_post(running, "/v1/jobs", 9000, b" " * 8000):
            # The first one's bytes have been counted once the next one is refused.
            def is_refused() -> bool:
                answer = httpx.post(f"{running.url}{path}", content=body, headers={"Content-Type": "application/json"})
                if answer.status_code != 503:
                    return False
                assert answer.json()["code"] == "busy"
                assert answer.headers["Retry-After"]
                return True

            eventually(is_refused, what="no room is left")
        # Whoever leaves gives the room back.
        eventually(lambda: httpx.post(f"{running.url}/v1/jobs", json=json.loads(body)).status_code == 202, what="room")


def endless(service: Service, request: str, headers: dict[str, str]) -> tuple[int, int]:
    """Send a request whose body does not end; return the answer's status and how many bytes of the body went away."""
    sent = 0
    with socket.create_connection(service.address, timeout=30) as connection:

        def send() -> None:
            nonlocal sent
            with suppress(OSError):
                while sent < 2 * MAX_TAKEN_BYTES:
                    sent += connection.send(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
                connection.shutdown(socket.SHUT_WR)  # it was read all along

        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = [f"{request} HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked", *lines, "", ""]
        connection.sendall("\r\n".join(head).encode())
        sending = threading.Thread(target=send)
        sending.start()
        answer = b""
        try:
            with suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    answer += piece
        finally:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sending.join(30)
    return int(answer.split()[1]), sent


@pytest.mark.parametrize("path", ["/v1/jobs/{}/events", "/v1/jobs/{}?wait=20", "/v1/jobs/{}", "/healthz"])
def test_a_get_whose_body_does_not_end_is_ended(service: Service, redis_client: redis.Redis, path: str) -> None:
    _, num_bytes = endless(service, f"GET {path.format(submit(service))}", {})
    assert num_bytes < MAX_TAKEN_BYTES
    nobody_reads(service, redis_client)


@pytest.fixture(scope="module")
def closed_gateway(redis_server: RedisServer) -> Iterator[Service]:
    """It has keys, serves a page's origin, and takes small bodies only."""
    bounds = {"api_max_body_bytes": MAX_BODY_BYTES, "api_max_bodies_bytes": 10 * MAX_BODY_BYTES}
    with serving(redis_server.url, api_keys=f"alice:{digest_of(KEY)}", api_cors_origins=ORIGIN, **bounds) as running:
        yield running


@pytest.fixture
def guarded(closed_gateway: Service, redis_url: str) -> Service:
    """A gateway with keys."""
    return closed_gateway


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET /v1/jobs", {}, 401),
        ("GET /healthz", {}, 200),
        ("POST /v1/jobs", JSON, 401),
        ("POST /v1/jobs", JSON | ALICE, 413),
        ("POST /v1/jobs/x/cancel", ALICE, 404),
        ("POST /nowhere", ALICE, 404),
        ("DELETE /v1/files/file-x", ALICE, 404),
        ("OPTIONS /v1/jobs", {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}, 200),
        ("OPTIONS /v1/jobs", {"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"}, 400),
    ],
)
def test_a_body_that_does_not_end_is_not_read_on_after_the_answer(
    guarded: Service, request_line: str, headers: dict[str, str], status: int
) -> None:
    answered, num_bytes = endless(guarded, request_line, headers)
    assert answered == status
    assert num_bytes < MAX_TAKEN_BYTES


def test_a_long_body_that_is_refused_unread_costs_the_connection(guarded: Service) -> None:
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}
    for method, headers, status in (("POST", JSON | ALICE, 413), ("POST", JSON, 401), ("OPTIONS", preflight, 200)):
        answer = httpx.request(
            method, f"{guarded.url}/v1/jobs", content=b" " * 8 * MAX_BODY_BYTES, headers=headers, timeout=30
        )
        assert (answer.status_code, answer.headers.get("Connection")) == (status, "close")


def test_a_body_that_was_read_or_is_short_leaves_the_connection_open(guarded: Service) -> None:
    long = json.dumps(QUESTION).encode() + b" " * (MAX_BODY_BYTES // 2)

    def status(method: str, path: str, headers: dict[str, str], content: bytes | Iterator[bytes]) -> int:
        answer = guarded.http.request(method, path, headers=headers, content=content)
        assert "Connection" not in answer.headers
        return answer.status_code

    assert status("POST", "/v1/jobs", JSON | ALICE, long) == 202
    assert status("POST", "/v1/jobs", JSON | ALICE, iter([long])) == 202
    assert status("POST", "/v1/jobs", JSON, b"{}") == 401
    assert status("POST", "/v1/jobs/x/cancel", JSON | ALICE, b"{}") == 404
    assert status("OPTIONS", "/v1/jobs", {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}, b"{}") == 200


def test_a_small_body_of_a_get_is_passed_over(service: Service, worker: ScriptedWorker) -> None:
    job_id = submit(service)
    worker.answer(job_id, "red")
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}?wait=5", f"/v1/jobs/{job_id}/events"):
        answer = httpx.request("GET", service.url + path, content=b"{}", timeout=30)
        assert (answer.status_code, "red" in answer.text) == (200, True)


def test_thousands_of_visits_leave_nothing(service: Service, redis_client: redis.Redis) -> None:
    job_id = submit(service)
    loop = service.gateway.broadcaster._task.get_loop()  # type: ignore[union-attr]

    def num_tasks() -> int:
        return len(asyncio.all_tasks(loop))

    before = num_tasks()
    for number in range(NUM_VISITS):
        path = (f"/v1/jobs/{job_id}/events", f"/v1/jobs/{job_id}?wait=30")[number % 2]
        with socket.create_connection(service.address, timeout=60) as visitor:
            visitor.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            if number % 10 == 0:
                visitor.recv(1)
    nobody_reads(service, redis_client)
    eventually(lambda: num_tasks() <= before + 5, what="the visits' tasks have ended")
    assert submit(service)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/jobs", 200),
        ("GET", "/", 200),
        ("GET", "/static/main.js", 200),
        ("GET", "/static/nothing.js", 404),
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/jobs", 405),
        ("POST", "/v1/jobs", 415),
        ("GET", "/v1/jobs/x/events", 404),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
    ],
)
def test_every_answer_carries_the_security_headers(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    assert answer.status_code == status
    assert [name for name in SECURITY_HEADERS if name not in answer.headers] == []
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "server" not in answer.headers


def test_a_mistake_of_ours_carries_them_too(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("secret-detail")

    monkeypatch.setattr(AsyncLedger, "view", fail)
    answer = httpx.get(f"{service.url}/v1/jobs/x", timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert all(name in answer.headers for name in SECURITY_HEADERS)


def test_nothing_secret_is_in_the_log(start: Start) -> None:
    api = start(AWS_ACCESS_KEY_ID="access-id-1", AWS_SECRET_ACCESS_KEY="very-secret-1", VISIONQ_LOG_LEVEL="DEBUG")
    api.wait_ready()
    with closing(httpx.Client(base_url=api.url, timeout=30)) as http:
        signed = http.post("/v1/uploads", json={"content_type": "image/png", "num_bytes": 5}).json()["url"]
        http.get("/v1/jobs?cursor=in-the-query", headers={"Authorization": "Bearer in-the-header"})
        http.post("/v1/jobs", json=QUESTION | {"question": "in-the-body"})
        http.get("/v1/jobs/in-the-path")
    stop(api)
    log = api.log.read_text()
    assert '"route": "/v1/uploads"' in log
    signature = httpx.URL(signed).params["X-Amz-Signature"]
    secrets = (signature, "access-id-1", "very-secret-1", "in-the-query", "in-the-header", "in-the-body", "in-the-path")
    assert [secret for secret in secrets if secret in log] == []


def stop(api: ApiProcess) -> None:
    api.process.terminate()
    api.process.wait(20)
