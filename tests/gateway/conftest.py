"""One gateway over an empty Redis, and a worker without a model behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.ledger import Ledger
from tests.gateway.service import Service, serving
from tests.servers import S3Server
from tests.unit.api_stub.workers import ScriptedWorker


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    opened = Ledger.connect(redis_url, LedgerConfig())
    yield opened
    opened.close()


@pytest.fixture
def worker(ledger: Ledger) -> ScriptedWorker:
    return ScriptedWorker(ledger)


@pytest.fixture
def service(redis_url: str) -> Iterator[Service]:
    """A gateway without keys and without storage."""
    with serving(redis_url) as running:
        yield running


@pytest.fixture
def media_service(redis_url: str, s3_server: S3Server) -> Iterator[Service]:
    """A gateway with storage."""
    s3_server.client()
    with serving(redis_url, s3_server.url) as running:
        yield running
