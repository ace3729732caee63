"""Fixtures that every floor of the suite shares: real Redis, real S3, a scrubbed environment."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from tests.check_only import is_check_only
from tests.servers import TESTED, RedisServer, S3Server, redis_binary

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

S3_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves to `make check`, before `-m` chooses."""
    for item in items:
        if is_check_only(item.nodeid):
            item.add_marker(pytest.mark.check)


@pytest.fixture(autouse=True)
def scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("VISIONQ_", "AWS_")) and name != "AWS_CA_BUNDLE":
            monkeypatch.delenv(name)
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """No command that a test runs in this process leaves its logging, or its last words, to the next test."""
    root = logging.getLogger()
    before, level = set(root.handlers), root.level
    hooks = sys.excepthook, threading.excepthook
    yield
    for handler in set(root.handlers) - before:
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook = hooks


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run. A laptop without one skips, CI fails."""
    if redis_binary() is None:
        reason = f"no Redis server {TESTED!r}: install the `local` and `dev` extras"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """URL of an empty Redis."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A connection to an empty Redis, text replies."""
    with redis.Redis.from_url(redis_url, decode_responses=True, socket_timeout=5) as client:
        yield client


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 for the whole run."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3_client(s3_server: S3Server) -> S3Client:
    """A boto3 client of the S3 server, with buckets `media` (allowed) and `private` (foreign)."""
    return s3_server.client()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family's name to the folder of its tiny checkpoint, built once per run."""
    # torch and transformers load in the tests that need them only
    from tests.tiny.every_family import build_any

    @cache
    def checkpoint(name: str) -> Path:
        return build_any(name, tmp_path_factory.mktemp(f"tiny-{name}"))

    return checkpoint
