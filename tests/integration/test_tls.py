"""Redis behind TLS: certificates are verified by every process that speaks to it, and a job goes through them all."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme
from celery.exceptions import NotRegistered
from pydantic import SecretStr

from api_stub.client.client import AsyncClient, Client
from api_stub.contract.event import JobCompleted
from api_stub.errors import StoreUnavailable
from tests.chaos.proxy import Network
from tests.gateway.service import serving
from tests.processes import WorkerProcess
from tests.servers import RedisServer
from worker.bootstrap import connect
from worker.broker.app import make_app
from worker.errors import CannotStart
from worker.settings import WorkerSettings

NO_S3 = "http://127.0.0.1:1"
EXIT_S = 60.0


@dataclass(frozen=True, slots=True)
class TlsRedis:
    """A port that speaks TLS for a Redis, as `localhost` only, and the files of its authority and of a foreign one."""

    port: int
    authority: Path
    stranger: Path

    @property
    def url(self) -> str:
        return self.url_of("localhost", self.authority)

    @property
    def url_of_a_stranger(self) -> str:
        """The certificate comes from somebody else."""
        return self.url_of("localhost", self.stranger)

    @property
    def url_of_another_host(self) -> str:
        """The certificate is good, and another host's."""
        return self.url_of("127.0.0.1", self.authority)

    @property
    def url_without_authority(self) -> str:
        """The system's own authorities, which know nothing of this one."""
        return f"rediss://localhost:{self.port}/0"

    def url_of(self, host: str, authority: Path) -> str:
        return f"rediss://{host}:{self.port}/0?ssl_ca_certs={quote(str(authority), safe='')}"


@pytest.fixture
def tls_redis(redis_server: RedisServer, redis_url: str, tmp_path: Path) -> Iterator[TlsRedis]:
    authority, stranger = trustme.CA(), trustme.CA()
    for name, ca in (("authority", authority), ("stranger", stranger)):
        ca.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with Network() as network:
        port = network.proxy(redis_server.port, context).port
        yield TlsRedis(port, tmp_path / "authority.pem", tmp_path / "stranger.pem")


@pytest.fixture(params=["url_of_a_stranger", "url_of_another_host", "url_without_authority"])
def refused_url(tls_redis: TlsRedis, request: pytest.FixtureRequest) -> str:
    """A URL under which nobody may trust the server."""
    url: str = getattr(tls_redis, request.param)
    return url


def test_a_job_goes_through_client_worker_gateway_and_reader(tls_redis: TlsRedis, tmp_path: Path) -> None:
    worker = WorkerProcess(
        tmp_path, tls_redis.url, NO_S3, model="demo", lease_s=6, beat_s=1, sweep_s=0.2, max_num_seqs=2, prepare_ahead=1
    )
    try:
        worker.wait_ready()
        with Client(tls_redis.url) as client, serving(tls_redis.url) as service:
            job = client.vqa(question="hello", max_new_tokens=4)
            events = list(job.events(timeout=60))
            assert isinstance(events[-1], JobCompleted)
            assert job.result(timeout=10).text == events[-1].result.text
            body = {"task": "visionq.vqa", "question": "hello", "sampling": {"max_new_tokens": 4}}
            posted = service.http.post("/v1/jobs", json=body, headers={"Prefer": "wait=20"})
            assert (posted.status_code, posted.json()["status"]) == (200, "completed"), posted.text
        asyncio.run(_asked(tls_redis.url))
        assert worker.terminate() == 0
    finally:
        worker.kill()


async def _asked(url: str) -> None:
    async with AsyncClient(url) as client:
        job = await client.vqa(question="hello", max_new_tokens=4)
        events = [event async for event in job.events(timeout=60)]
        assert isinstance(events[-1], JobCompleted)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
def test_an_unknown_task_over_tls_harms_no_worker(tls_redis: TlsRedis) -> None:
    """Celery notes it in the result backend, which wants to be told about certificates in words of its own."""
    app = make_app(WorkerSettings(redis_url=SecretStr(tls_redis.url)))
    app.backend.mark_as_failure("unknown", NotRegistered("visionq.unknown"))
    assert app.backend.get_state("unknown") == "FAILURE"
    app.close()


def test_a_client_refuses_a_server_it_cannot_trust(refused_url: str) -> None:
    with Client(refused_url) as client, pytest.raises(StoreUnavailable, match="certificate"):
        client.vqa(question="hello")
    with Client(refused_url) as client, pytest.raises(StoreUnavailable, match="certificate"):
        client.job("any").status()
    with Client(refused_url) as client, pytest.raises(StoreUnavailable):
        list(client.job("any").events(timeout=5))


def test_an_async_client_refuses_a_server_it_cannot_trust(refused_url: str) -> None:
    async def ask() -> None:
        async with AsyncClient(refused_url) as client:
            with pytest.raises(StoreUnavailable, match="certificate"):
                await client.vqa(question="hello")

    asyncio.run(ask())


def test_a_worker_that_cannot_trust_its_redis_does_not_start(refused_url: str) -> None:
    with pytest.raises(CannotStart, match=r"VISIONQ_REDIS_URL.*certificate"):
        connect(WorkerSettings(redis_url=SecretStr(refused_url)))
