"""A ledger and a worker without a model, for the tests of the producer side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api_stub.client.client import Client
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.unit.api_stub.workers import ScriptedWorker


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    opened = Ledger.connect(redis_url, LedgerConfig())
    yield opened
    opened.close()


@pytest.fixture
def worker(ledger: Ledger) -> ScriptedWorker:
    return ScriptedWorker(ledger)


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as opened:
        yield opened
