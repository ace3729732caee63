"""The system under test: Redis and S3 behind proxies, three workers, each with a network of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from api_stub.client.client import Client
from api_stub.settings import ClientSettings
from tests.chaos.fleet import Fleet
from tests.chaos.proxy import Network, TcpProxy
from tests.failovers import follow, hand_over
from tests.servers import RedisServer, S3Server
from tests.storage_faults import FaultyStorage, faulty_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger(__name__)

NUM_WORKERS: Final = 3
#: An answer of Redis means that it is on disk, as a database that is killed here must have it.
DURABLE: Final = ("--appendfsync", "always")
LEASE_S: Final = 5.0
DRAIN_S: Final = 3.0
GRACE_S: Final = 2.0
KEPT_S: Final = 7200
MAX_NUM_SEQS: Final = 8
PREPARE_AHEAD: Final = 4
#: Attempts are bounded so that a poison job ends; here workers are killed at random, and no job is poison.
MAX_ATTEMPTS: Final = 20

WORKER_SETTINGS: Final[dict[str, object]] = {
    "model": "demo",
    "lease_s": LEASE_S,
    "beat_s": 1,
    "grace_s": GRACE_S,
    "sweep_s": 0.5,
    "drain_s": DRAIN_S,
    "max_attempts": MAX_ATTEMPTS,
    "max_num_seqs": MAX_NUM_SEQS,
    "prepare_ahead": PREPARE_AHEAD,
    "media_cache_bytes": 1024 * 1024,  # too small for all media, so that some are fetched and some are not
    "storage_timeout_s": 3,
}


@dataclass(frozen=True, slots=True)
class Plant:
    """Everything that can be broken. `storages` and `links` are the workers' ways to S3 and Redis, one each;
    `producers_link` is that of all clients. `servers`: the master and, after a failover, its replica.
    """

    directory: Path
    servers: list[RedisServer]
    s3: S3Server
    s3_client: S3Client
    storages: tuple[FaultyStorage, ...]
    links: tuple[TcpProxy, ...]
    producers_link: TcpProxy
    fleet: Fleet
    kept_s: int

    @property
    def redis(self) -> RedisServer:
        """The server that the name leads to."""
        return self.servers[0]

    @property
    def names(self) -> tuple[TcpProxy, ...]:
        """Every way to Redis."""
        return (*self.links, self.producers_link)

    def fail_over(self, read_only_s: float) -> float:
        """Swap master and replica as managed services do; the name moves `read_only_s` later.

        Returns when it has, in seconds since 1970. The old master stays up as a read-only replica.
        """
        self.pair_up()
        hand_over(*self.servers)
        time.sleep(read_only_s)
        self.servers.reverse()
        for name in self.names:
            name.lead_to(self.redis.port)
        return time.time()

    def pair_up(self) -> None:
        """Give the master a replica that has all it has."""
        if len(self.servers) == 1:
            (self.directory / "second").mkdir()
            self.servers.append(RedisServer(self.directory / "second", *DURABLE))
        master, replica = self.servers
        follow(replica, master)

    @property
    def scratch(self) -> Path:
        """The workers' TMPDIR; its path marks their processes and those that they start."""
        return self.directory / "scratch"

    def client(self) -> Client:
        """A producer's or reader's client."""
        settings = ClientSettings(
            redis_url=self.producers_link.url,
            lease_s=LEASE_S,
            grace_s=GRACE_S,
            max_attempts=MAX_ATTEMPTS,
            result_ttl_s=self.kept_s,
            events_ttl_s=self.kept_s,
        )
        return Client(settings=settings)

    def heal(self) -> None:
        """End all faults of network and storage."""
        for link in self.names:
            link.heal()
        for storage in self.storages:
            storage.always = None


@contextmanager
def plant(directory: Path, num_workers: int = NUM_WORKERS, kept_s: int = KEPT_S) -> Iterator[Plant]:
    """Start everything; the workers serve when the block begins. Nothing is left when it ends.

    `kept_s`: how long results and event streams are kept.
    """
    scratch = directory / "scratch"
    scratch.mkdir()
    with ExitStack() as stack:
        redis_server = RedisServer(directory, *DURABLE)
        servers = [redis_server]
        stack.callback(lambda: [server.kill() for server in servers])
        s3 = S3Server(directory)
        stack.callback(s3.stop)
        s3_client = s3.client()
        stack.callback(s3_client.close)
        storages = tuple(stack.enter_context(faulty_storage(s3.url)) for _ in range(num_workers))
        network = stack.enter_context(Network())
        links = tuple(network.proxy(redis_server.port) for _ in range(num_workers))
        fleet = Fleet(
            directory,
            [link.url for link in links],
            [storage.url for storage in storages],
            variables={"TMPDIR": str(scratch)},
            settings=WORKER_SETTINGS | {"result_ttl_s": kept_s, "events_ttl_s": kept_s},
        )
        stack.callback(fleet.kill)
        fleet.start()
        logger.info("%d workers serve", num_workers)
        producers_link = network.proxy(redis_server.port)
        yield Plant(directory, servers, s3, s3_client, storages, links, producers_link, fleet, kept_s)
