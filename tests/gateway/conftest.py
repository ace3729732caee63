"""One gateway without keys for all tests, over a Redis that each finds empty; behind it a worker without a model."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from api_stub import Client
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.gateway.service import Service, serving
from tests.servers import RedisServer, S3Server
from tests.unit.api_stub.workers import ScriptedWorker

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}


@pytest.fixture(scope="package")
def open_gateway(redis_server: RedisServer, s3_server: S3Server) -> Iterator[Service]:
    """One for this package's tests and no longer: it reads, sweeps and answers batches on the Redis of all tests."""
    s3_server.client()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with serving(redis_server.url, s3_server.url) as running:
            yield running


@pytest.fixture
def service(open_gateway: Service, redis_url: str) -> Service:
    """A gateway without keys."""
    return open_gateway


@pytest.fixture(params=["redis", "http"])
def url(request: pytest.FixtureRequest, service: Service, redis_url: str) -> str:
    """Where a client goes."""
    return redis_url if request.param == "redis" else service.url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("VISIONQ_API_"):
            monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    opened = Ledger.connect(redis_url, LedgerConfig())
    yield opened
    opened.close()


@pytest.fixture
def worker(ledger: Ledger) -> ScriptedWorker:
    return ScriptedWorker(ledger)
