"""A process of the last release, and this release's ledger, on one Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api_stub.ledger.ledger import Ledger
from api_stub.ledger.settings import LedgerConfig
from tests.compat.earlier import WHEEL, Earlier
from tests.servers import RedisServer

#: Both sides' limits: jobs are held back early, and a lost job is found within a second.
LIMITS = {"lease_s": 1.0, "grace_s": 0.3, "window": 2}


@pytest.fixture(scope="module")
def process(redis_server: RedisServer) -> Iterator[Earlier]:
    """One for the tests of a module; a child costs a second to start, and its readers keep their channels."""
    child = Earlier(redis_server.url, **LIMITS)
    assert str(WHEEL) in child("where")
    yield child
    child.close()


@pytest.fixture
def earlier(process: Earlier, redis_url: str) -> Earlier:
    """The last release, on an empty Redis."""
    return process


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    """This release's ledger, on the same Redis."""
    opened = Ledger.connect(redis_url, LedgerConfig(**LIMITS, unserved_ttl_s=4))
    yield opened
    opened.close()
