"""Connections to Redis are made in one place, so that all of them leave a server that is not the master any more."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "api_stub" / "ledger" / "pools.py"
#: What makes connections in redis-py, by the last name of a call. kombu's own are `worker.broker.transport`'s.
MAKERS = {"Redis", "StrictRedis", "from_url", "from_pool", "ConnectionPool", "BlockingConnectionPool", "RedisCluster"}


def calls(path: Path) -> list[str]:
    """The calls in a file that make a client or a pool of redis-py."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).rpartition(".")[2] in MAKERS
    ]


def test_nothing_else_makes_connections_to_redis() -> None:
    assert len(calls(HOME)) >= 4
    others = [path for package in ("api_stub", "worker") for path in (ROOT / package).rglob("*.py") if path != HOME]
    assert [call for path in others for call in calls(path)] == []
