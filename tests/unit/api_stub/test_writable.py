"""Whether Redis takes writes is found out without one and told in words; what is no master is named at the start."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr, ValidationError
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.client.client import Client
from api_stub.errors import InvalidSettings, StoreUnavailable
from api_stub.ledger import pools, writable
from api_stub.settings import ClientSettings, GatewaySettings
from tests.servers import RedisServer, eventually, free_port, redis_binary
from worker.bootstrap import connect
from worker.errors import CannotStart
from worker.settings import WorkerSettings

JOB = {"task": "visionq.vqa", "question": "hello"}


def told(url: str) -> str:
    """What both kinds of clients say; empty when writes are taken."""

    async def asked() -> str:
        async with pools.async_client(url, timeout_s=0.5) as client:
            try:
                await writable.async_probe(client, 2.0)
            except redis.RedisError as error:
                return writable.reason(error)
        return ""

    with pools.client(url, timeout_s=0.5) as client:
        try:
            writable.probe(client)
            words = ""
        except redis.RedisError as error:
            words = writable.reason(error)
    assert asyncio.run(asked()) == words
    return words


@pytest.fixture
def broken(redis_client: redis.Redis) -> Iterator[redis.Redis]:
    """A Redis that a test may break; afterwards it is a master with room."""
    yield redis_client
    redis_client.replicaof("NO", "ONE")
    redis_client.config_set("maxmemory", 0)
    redis_client.config_set("min-replicas-to-write", 0)


BREAK: dict[str, Callable[[redis.Redis], object]] = {
    "redis is read-only, a replica (READONLY)": lambda client: client.replicaof("127.0.0.1", 1),
    "redis is full (OOM)": lambda client: client.config_set("maxmemory", 1),
    "redis has fewer replicas than it wants for a write (NOREPLICAS)": lambda client: client.config_set(
        "min-replicas-to-write", 1
    ),
}


@pytest.mark.parametrize("words", BREAK)
def test_a_refusal_is_told_and_nothing_is_written(broken: redis.Redis, redis_url: str, words: str) -> None:
    def num_changes() -> int:
        return int(broken.info("persistence")["rdb_changes_since_last_save"])

    before = num_changes()
    assert told(redis_url) == ""
    assert (num_changes(), broken.dbsize()) == (before, 0)
    BREAK[words](broken)
    assert told(redis_url) == words


def test_a_user_who_may_not_write_is_told_so(broken: redis.Redis, redis_url: str) -> None:
    broken.acl_setuser("looks", enabled=True, nopass=True, keys=["*"], commands=["+get", "+info", "+client", "+hello"])
    try:
        assert told(redis_url.replace("//", "//looks:any@")) == "redis does not let this user write (NOPERM)"
    finally:
        broken.acl_deluser("looks")


def test_absence_and_silence_are_told_in_time() -> None:
    assert told(f"redis://127.0.0.1:{free_port()}/0") == "redis does not answer"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert told(f"redis://127.0.0.1:{silent.getsockname()[1]}/0") == "redis does not answer"
        assert time.monotonic() - began < 10


SENTINELS = (
    "sentinel://:secret@one:26379/0",
    "redis+sentinel://:secret@one:26379,two:26379/0/mymaster",
    "sentinel://:secret@one:26379;sentinel://:secret@two:26379",
)
SEVERAL = ("redis://:secret@one:6379,two:6379/0", "redis://:secret@one:6379/0;redis://:secret@two:6379/0")


@pytest.mark.parametrize("url", SENTINELS + SEVERAL)
def test_sentinels_and_lists_of_addresses_are_refused_by_name(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Redis Sentinel is not supported" if url in SENTINELS else "several addresses are not supported"
    way = "give one address that always leads to the master, a name that moves or a TCP proxy"
    refused: list[object] = []
    for settings in (ClientSettings, GatewaySettings):
        with pytest.raises(InvalidSettings) as caught:
            settings.load(url)
        refused.append(caught.value)
    with pytest.raises(ValidationError) as invalid:
        WorkerSettings(redis_url=SecretStr(url))
    monkeypatch.setenv("VISIONQ_REDIS_URL", url)
    shown = CliRunner().invoke(app, ["status", "an-id"])
    assert shown.exit_code != 0
    for message in (*map(str, (*refused, invalid.value)), shown.output):
        assert f"{name}: {way}" in " ".join(message.split()), message
        assert "secret" not in message


def test_a_password_may_hold_commas_and_semicolons() -> None:
    assert ClientSettings.load("redis://user:a,b;c@one:6379/0").redis_url is not None


@pytest.fixture
def sentinel(tmp_path: Path, redis_server: RedisServer) -> Iterator[str]:
    """The URL of a real Sentinel."""
    program, port = redis_binary(), free_port()
    assert program is not None
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {redis_server.port} 1\n")
    process = subprocess.Popen([program, str(configuration), "--sentinel"], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        with redis.Redis.from_url(url) as client:
            eventually(lambda: answers(client), what="the Sentinel answers")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_a_sentinel_at_the_address_is_named(sentinel: str) -> None:
    words = "a Redis Sentinel answers there: give the address that always leads to the master"
    assert told(sentinel) == f"redis cannot be used: {words}"
    with Client(settings=ClientSettings(redis_url=sentinel)) as client, pytest.raises(StoreUnavailable, match=words):
        client.submit(JOB)
    with pytest.raises(CannotStart, match=words):
        connect(WorkerSettings(redis_url=SecretStr(sentinel)))
