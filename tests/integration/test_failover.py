"""Every part of visionq over three kinds of failover: what was open before works again soon, and probes tell the truth.

Planned: the name moves, the old server stays up, read-only, with its connections alive. Promotion: the master is lost
and its replica takes over. Read-only: one server refuses writes for a while.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest
import redis

from api_stub.client.client import AsyncClient, Client
from api_stub.contract import names
from api_stub.contract.status import JobStatus
from api_stub.errors import StoreUnavailable
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from api_stub.settings import ClientSettings
from tests.chaos.proxy import Network
from tests.e2e.probes import probe
from tests.failovers import NOBODY, Pair
from tests.gateway.nginx import PAGE, nginx_program
from tests.gateway.service import serving
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually, free_port
from tests.unit.api_stub.ledger_kit import lease_ends, started
from tests.unit.api_stub.workers import ScriptedWorker

#: The promise is ten seconds; a machine that does ten other things may take twice as long.
SOON_S = 20.0
READ_ONLY_S = 4.0
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")  # Debian's; elsewhere it is built in
LOST = "of-a-lost-worker"
JOB = {"task": "visionq.vqa", "question": "hello", "sampling": {"max_new_tokens": 2}}

Failover = Callable[[Pair, Callable[[], object]], None]


def planned(pair: Pair, meanwhile: Callable[[], object]) -> None:
    """The old server hears nothing from the new one: whoever stays there misses everything."""
    pair.hand_over(meanwhile)
    pair.deafen()


def promotion(pair: Pair, meanwhile: Callable[[], object]) -> None:
    pair.promote()


def read_only(pair: Pair, meanwhile: Callable[[], object]) -> None:
    with pair.master.client() as master:
        master.replicaof("127.0.0.1", NOBODY)
        meanwhile()
        time.sleep(READ_ONLY_S)
        master.replicaof("NO", "ONE")


@pytest.fixture(params=[planned, promotion, read_only])
def fail_over(request: pytest.FixtureRequest) -> Failover:
    failover: Failover = request.param
    return failover


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with Network() as network, closing_pair(Pair(tmp_path, network)) as pair:
        yield pair


@contextmanager
def closing_pair(pair: Pair) -> Iterator[Pair]:
    try:
        yield pair
    finally:
        pair.kill()


@contextmanager
def worker_at(
    server: RedisServer, job_id: str | None = None, before: ScriptedWorker | None = None
) -> Iterator[ScriptedWorker]:
    """A worker beside the name: it takes a job, or goes on with one where it was left."""
    with ledger_at(server) as ledger:
        worker = ScriptedWorker(ledger)
        if job_id is not None:
            worker.take(job_id)
        if before is not None:
            worker._claim, worker._number, worker.text = before._claim, before._number, before.text
        yield worker


def ledger_at(server: RedisServer) -> closing[Ledger]:
    return closing(Ledger.connect(server.url, LedgerConfig(lease_s=120)))


def soon(action: Callable[[], object], what: str) -> None:
    """Repeat what an outage refuses until it works."""

    def works() -> bool:
        try:
            action()
        except (StoreUnavailable, redis.RedisError, httpx.HTTPError):
            time.sleep(0.1)
            return False
        return True

    eventually(works, SOON_S, what)


def test_a_client_submits_and_reads_on(pair: Pair, fail_over: Failover) -> None:
    heard: list[str] = []
    with ExitStack() as stack:
        client = stack.enter_context(Client(settings=ClientSettings(redis_url=pair.name.url)))
        handle = client.submit(JOB)
        with worker_at(pair.master, handle.id) as before:
            reader = threading.Thread(target=lambda: heard.extend(handle.stream()), daemon=True)
            reader.start()
            before.say("re")
            eventually(lambda: heard == ["re"], what="the reader reads")
        fail_over(pair, lambda: None)
        after = stack.enter_context(worker_at(pair.master, before=before))
        after.say("d")
        after.finish()
        soon(lambda: client.submit(JOB), "a submit")
        reader.join(SOON_S)
        assert "".join(heard) == "red"
        second = client.submit(JOB)
        after.answer(second.id, "blue")
        assert second.result(timeout=SOON_S).text == "blue"


def test_an_async_client_submits_and_reads_on(pair: Pair, fail_over: Failover) -> None:
    async def use() -> None:
        heard: list[str] = []
        async with AsyncClient(settings=ClientSettings(redis_url=pair.name.url)) as client:
            handle = await client.submit(JOB)
            before = await asyncio.to_thread(lambda: taken(pair.master, handle.id))

            async def read() -> None:
                async for piece in handle.stream():
                    heard.append(piece)  # noqa: PERF401 - it is looked at meanwhile

            reading = asyncio.create_task(read())
            await asyncio.to_thread(before.say, "re")
            async with asyncio.timeout(SOON_S):
                while not heard:
                    await asyncio.sleep(0.05)
            await asyncio.to_thread(fail_over, pair, lambda: None)
            await asyncio.to_thread(finished, pair.master, before, "d")
            async with asyncio.timeout(SOON_S):
                await reading
            assert "".join(heard) == "red"
            async with asyncio.timeout(SOON_S):
                while True:
                    try:
                        await client.submit(JOB)
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.1)

    asyncio.run(use())


def taken(server: RedisServer, job_id: str) -> ScriptedWorker:
    worker = ScriptedWorker(Ledger.connect(server.url, LedgerConfig(lease_s=120)))
    worker.take(job_id)
    return worker


def finished(server: RedisServer, before: ScriptedWorker, *pieces: str) -> None:
    with worker_at(server, before=before) as worker:
        worker.say(*pieces)
        worker.finish()
    before.ledger.close()


def test_a_gateway_serves_and_its_reaper_sweeps(pair: Pair, fail_over: Failover) -> None:
    told: list[str] = []
    with serving(pair.name.url, sweep_s=0.5) as service, ExitStack() as stack:
        assert service.http.get("/readyz").status_code == 200
        job_id = service.http.post("/v1/jobs", json=JOB).json()["job_id"]
        with (
            worker_at(pair.master, job_id) as before,
            ledger_at(pair.master) as ledger,
        ):
            reader = threading.Thread(target=lambda: told.extend(read_events(service.url, job_id)), daemon=True)
            reader.start()
            before.say("re")
            eventually(lambda: "output.delta" in told, what="the reader reads")
            started(ledger, LOST)

        def probed() -> None:
            eventually(lambda: service.http.get("/readyz").status_code == 503, SOON_S, "it is not ready")
            answer = service.http.get("/readyz").json()
            assert answer == {"status": "redis is read-only, a replica (READONLY)"}
            assert service.http.get("/healthz").status_code == 200

        fail_over(pair, probed)
        after = stack.enter_context(worker_at(pair.master, before=before))
        after.finish()
        soon(lambda: service.http.post("/v1/jobs", json=JOB).raise_for_status(), "a submit")
        eventually(lambda: service.http.get("/readyz").status_code == 200, SOON_S, "it is ready")
        reader.join(SOON_S)
        assert told[-1] == "job.completed"
        with pair.master.client() as master:
            lease_ends(master, LOST)
            eventually(lambda: master.hget(names.job_key(LOST), "status") == "queued", SOON_S, "the reaper has swept")


def read_events(url: str, job_id: str) -> Iterator[str]:
    with httpx.stream("GET", f"{url}/v1/jobs/{job_id}/events", timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield str(json.loads(line.removeprefix("data: "))["type"])


def test_a_client_follows_the_documented_proxy(tmp_path: Path) -> None:
    """nginx' old processes keep the connections that they have: after a reload the old server is still talked to."""
    with ExitStack() as stack:
        pair = stack.enter_context(closing_pair(Pair(tmp_path, stack.enter_context(Network()))))
        url, move = stack.enter_context(tcp_proxy(tmp_path, pair))
        client = stack.enter_context(Client(settings=ClientSettings(redis_url=url)))
        assert client.submit(JOB).status().status is JobStatus.QUEUED
        pair.hand_over()
        move()
        soon(lambda: client.submit(JOB), "a submit")
        old = stack.enter_context(pair.other.client())
        assert old.info("replication")["role"] == "slave"


@contextmanager
def tcp_proxy(directory: Path, pair: Pair) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run nginx as docs/operate.md says; yield its URL and what leads it to the pair's master."""
    program = nginx_program()
    port = free_port()
    written = re.search(r"^stream \{\n.*?^\}$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert written is not None
    stream = written.group().replace("127.0.0.1:6380", f"127.0.0.1:{port}")
    configuration = directory / "nginx.conf"

    def write() -> None:
        module = f"load_module {STREAM_MODULE};" if STREAM_MODULE.exists() else ""
        there = stream.replace("127.0.0.1:6379", f"127.0.0.1:{pair.master.port}")
        log, pid = directory / "error.log", directory / "nginx.pid"
        configuration.write_text(f"{module} daemon off; pid {pid}; error_log {log}; events {{}}\n{there}\n")

    def move() -> None:
        write()
        process.send_signal(signal.SIGHUP)  # nginx -s reload

    write()
    process = subprocess.Popen([program, "-e", str(directory / "error.log"), "-c", str(configuration)])
    try:
        eventually(lambda: process.poll() is not None or (directory / "nginx.pid").exists(), what="nginx listens")
        assert process.poll() is None, (directory / "error.log").read_text()
        yield f"redis://127.0.0.1:{port}/0", move
    finally:
        process.terminate()
        process.wait(SOON_S)


@pytest.fixture
def worker(pair: Pair, tmp_path: Path, s3_server: S3Server) -> Iterator[tuple[WorkerProcess, int]]:
    port = free_port()
    process = WorkerProcess(
        tmp_path,
        pair.name.url,
        s3_server.url,
        model="demo",
        http_port=port,
        lease_s=6,
        beat_s=1,
        sweep_s=0.5,
        grace_s=2,
    )
    try:
        yield process.wait_ready(), port
    finally:
        process.kill()


def test_a_worker_works_on(pair: Pair, fail_over: Failover, worker: tuple[WorkerProcess, int]) -> None:
    process, port = worker
    with closing(Ledger.connect(pair.name.url, LedgerConfig(grace_s=2))) as ledger:
        answered(pair.master, "before")
        eventually(lambda: probe(port, "/readyz")[0] == 200, SOON_S, "it is ready")

        def probed() -> None:
            eventually(lambda: probe(port, "/readyz")[0] == 503, SOON_S, "it is not ready")
            assert "redis is read-only, a replica (READONLY)" in probe(port, "/readyz")[1]["problems"]
            assert probe(port, "/healthz")[0] == 200

        fail_over(pair, probed)
        began = time.monotonic()
        answered(pair.master, "after")
        assert time.monotonic() - began < SOON_S
        eventually(lambda: probe(port, "/readyz")[0] == 200, SOON_S, "it is ready again")
        assert process.process.poll() is None
        assert ledger.view("before") is not None


def answered(server: RedisServer, job_id: str) -> None:
    """Hand a job in beside the name and wait for its end."""
    with Client(settings=ClientSettings(redis_url=server.url, grace_s=2)) as client:
        handle = client.submit(JOB, job_id=job_id)
        assert handle.result(timeout=2 * SOON_S).text is not None
        assert client.job(job_id).status().status is JobStatus.COMPLETED
