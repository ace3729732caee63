"""Two servers behind one name, and how the second takes over from the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tests.chaos.proxy import Network, TcpProxy
from tests.servers import RedisServer, eventually

#: Beside 127.0.0.1, where nobody listens: a replica of it has no master.
NOBODY = 1
SYNC_S = 60.0


class Pair:
    """`master` and `other`; `name` is the address that leads to the master. Within a `Network`; `kill` ends both."""

    def __init__(self, directory: Path, network: Network) -> None:
        servers = []
        for side in ("one", "two"):
            (directory / side).mkdir()
            servers.append(RedisServer(directory / side))
        self.master, self.other = servers
        self.name = network.proxy(self.master.port)

    def kill(self) -> None:
        """End both servers."""
        for server in (self.master, self.other):
            server.kill()

    def hand_over(self, before_name_moves: Callable[[], object] = lambda: None) -> None:
        """Fail over as planned: both servers stay up, the old one as the new one's read-only replica."""
        hand_over(self.master, self.other)
        before_name_moves()
        self._move()

    def promote(self) -> None:
        """Lose the master, and promote its replica."""
        follow(self.other, self.master)
        self.master.kill()
        with self.other.client() as client:
            client.replicaof("NO", "ONE")
        self._move()

    def deafen(self) -> None:
        """Cut the replication: whoever still listens at the old server hears nothing."""
        with self.other.client() as client:
            client.replicaof("127.0.0.1", NOBODY)

    def _move(self) -> None:
        self.master, self.other = self.other, self.master
        self.name.lead_to(self.master.port)


def follow(replica: RedisServer, master: RedisServer) -> None:
    """Make a server the other's replica and wait until it has all that the master has."""
    with replica.client() as client, master.client() as leader:
        leader.config_set("repl-diskless-sync-delay", 0)
        client.replicaof("127.0.0.1", master.port)

        def is_in_sync() -> bool:
            told = client.info("replication")
            return bool(
                told["role"] == "slave"
                and told["master_link_status"] == "up"
                and leader.info("replication")["connected_slaves"] > 0
            )

        eventually(is_in_sync, SYNC_S, "the replica is in sync")


def hand_over(master: RedisServer, replica: RedisServer, names: Iterable[TcpProxy] = ()) -> None:
    """Swap two servers' roles as managed services do: writes wait until the replica has them all. No write is lost.

    `names` then lead to the new master; their old connections stay.
    """
    follow(replica, master)
    with master.client() as old, replica.client() as new:
        old.execute_command("FAILOVER", "TO", "127.0.0.1", replica.port, "TIMEOUT", int(SYNC_S * 1000))
        eventually(lambda: new.info("replication")["role"] == "master", SYNC_S, "the replica is the master")
        eventually(lambda: old.info("replication")["role"] == "slave", SYNC_S, "the master is the replica")
    for name in names:
        name.lead_to(replica.port)
