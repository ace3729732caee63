"""What the doctor asks the Redis server itself: version, durability, eviction, memory, clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import redis

from api_stub.doctor.finding import Finding, Level, judged
from api_stub.ledger.verdicts import is_passing

OLDEST: Final = (6, 2)
#: Redis' clock alone decides about jobs; another one is only confusing in logs.
MAX_SKEW_S: Final = 5.0
#: Share of the memory limit from which on work is about to be refused.
FULL: Final = 0.9


def server_findings(client: redis.Redis) -> Iterator[Finding]:
    """Yield what INFO and TIME tell. An answer that the ACL refuses is a warning."""
    try:
        info: dict[str, Any] = client.info()
    except redis.ResponseError as error:
        if is_passing(error):
            raise
        yield Finding("server", Level.WARNING, "INFO is refused: version, durability and memory are not known")
        return
    yield _version(str(info.get("redis_version", "0")), info.get("valkey_version"))
    is_durable = info.get("aof_enabled") == 1
    yield judged(
        "durability", is_durable, f"append-only file {'on' if is_durable else 'off: a crash of Redis loses jobs'}"
    )
    if info.get("aof_last_write_status", "ok") != "ok" or info.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield Finding("durability", Level.PROBLEM, "the append-only file could not be written")
    policy = str(info.get("maxmemory_policy", "unknown"))
    yield judged("eviction", policy == "noeviction", f"maxmemory-policy {policy}; only noeviction keeps every job")
    yield _memory(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))
    if info.get("role") != "master":
        yield Finding("role", Level.PROBLEM, f"this Redis is a {info.get('role')}: it takes no jobs")
    yield _clock(client)


def _version(version: str, valkey: object) -> Finding:
    """Judge by the version of Redis that the server says it is like; Valkey has one of its own beside it."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    named = f"Redis {version}" if valkey is None else f"Valkey {valkey}, like Redis {version}"
    return judged("version", numbers >= OLDEST, f"{named}; {'.'.join(map(str, OLDEST))} or newer is needed")


def _memory(used: int, limit: int) -> Finding:
    mib = 1024 * 1024
    if not limit:
        message = f"{used / mib:.1f} MiB used and no maxmemory: the machine's memory is the limit"
        return Finding("memory", Level.WARNING, message)
    return judged("memory", used < FULL * limit, f"{used / mib:.1f} MiB of {limit / mib:.1f} MiB used", Level.WARNING)


def _clock(client: redis.Redis) -> Finding:
    before = time.time()
    seconds, microseconds = client.time()
    skew_s = seconds + microseconds / 1e6 - (before + time.time()) / 2
    return judged(
        "clock", abs(skew_s) < MAX_SKEW_S, f"Redis' clock is {skew_s:+.1f} s from this machine's", Level.WARNING
    )
