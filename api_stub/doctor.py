"""`visionq doctor`: is this Redis fit for the work, do the settings agree, and is anything left lying about?

In the order in which one would ask: the server (version, durability, eviction, memory, clock), the settings, the
workers, the contents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import redis

from api_stub.contract import names
from api_stub.ledger import writable
from api_stub.ledger.census import MAX_NAMED, Census, take_census
from api_stub.ledger.settings import LedgerConfig
from api_stub.ledger.verdicts import code_of, is_passing

OLDEST: Final = (6, 2)
#: Redis' clock alone decides about jobs; another one is only confusing in logs.
MAX_SKEW_S: Final = 5.0
#: Share of the memory limit from which on work is about to be refused.
FULL: Final = 0.9
#: After this kombu delivers an unacknowledged message once more. A result that is gone by then could run again.
VISIBILITY_TIMEOUT_S: Final = 600
#: A leaked message is older than any live worker lets it become.
OLD_UNACKED_S: Final = VISIBILITY_TIMEOUT_S + 120
#: A webhook that waits longer than this for its turn has no gateway that sends it.
LATE_WEBHOOK_S: Final = 60
_UNACKED: Final = "unacked"
_UNACKED_INDEX: Final = "unacked_index"


class Level(StrEnum):
    """How bad it is. A warning is worth reading; a problem makes the command fail."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    message: str


def judged(check: str, is_fine: bool, message: str, otherwise: Level = Level.PROBLEM) -> Finding:
    """Return a finding that is fine or not."""
    return Finding(check, Level.OK if is_fine else otherwise, message)


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


def examine(client: redis.Redis, config: LedgerConfig, max_keys: int) -> Iterator[Finding]:
    """Yield findings as they are made. Raises redis.RedisError when Redis does not answer."""
    client.ping()
    yield Finding("connection", Level.OK, "Redis answers")
    yield _writing(client)
    yield from server_findings(client)
    yield from _settings(client, config)
    yield from _broker(client)
    yield from _webhooks(client)
    census = take_census(client, max_keys)
    yield from _contents(census)
    yield from _queues(client, census)


def _writing(client: redis.Redis) -> Finding:
    try:
        writable.probe(client)
    except redis.ResponseError as error:
        is_allowed = code_of(error) != "NOPERM"
        return Finding("writing", Level.PROBLEM if is_allowed else Level.WARNING, writable.reason(error))
    return Finding("writing", Level.OK, "Redis takes writes")


def _settings(client: redis.Redis, config: LedgerConfig) -> Iterator[Finding]:
    yield judged(
        "settings",
        config.result_ttl_s > VISIBILITY_TIMEOUT_S,
        f"VISIONQ_RESULT_TTL_S is {config.result_ttl_s}; above {VISIBILITY_TIMEOUT_S} no job runs twice",
    )
    yield judged(
        "settings",
        config.events_ttl_s <= config.result_ttl_s,
        f"VISIONQ_EVENTS_TTL_S is {config.events_ttl_s}, VISIONQ_RESULT_TTL_S {config.result_ttl_s}",
        Level.WARNING,
    )
    now, _ = client.time()
    leases = {str(lease) for lease in client.zrangebyscore(names.LEASES_KEY, now, "+inf")} | {f"{config.lease_s:.9g}"}
    values = " and ".join(sorted(leases, key=float))
    yield judged("settings", len(leases) == 1, f"VISIONQ_LEASE_S is {values} s; all processes must share one value")
    yield from _shared(client)


def _shared(client: redis.Redis) -> Iterator[Finding]:
    """Compare what the workers and gateways say that they sweep by."""
    now, _ = client.time()
    members = [str(member).split() for member in client.zrangebyscore(names.SETTINGS_KEY, now, "+inf")]
    values: dict[str, set[str]] = {}
    for name, _, value in (pair.partition("=") for pairs in members for pair in pairs):
        values.setdefault(name, set()).add(value)
    for name, found in values.items():
        if len(found) > 1:
            differing = " and ".join(sorted(found, key=float))
            message = f"VISIONQ_{name.upper()} is {differing}; workers and gateways should share one value"
            yield Finding("settings", Level.WARNING, message)


def _broker(client: redis.Redis) -> Iterator[Finding]:
    now, _ = client.time()
    num_old = client.zcount(_UNACKED_INDEX, "-inf", now - OLD_UNACKED_S)
    message = f"{client.hlen(_UNACKED)} messages in workers' hands, {num_old} of them longer than {OLD_UNACKED_S} s"
    yield judged("messages", num_old == 0, message, Level.WARNING)


def _webhooks(client: redis.Redis) -> Iterator[Finding]:
    now, _ = client.time()
    num, oldest = client.zcard(names.DELIVERIES_KEY), client.zrange(names.DELIVERIES_KEY, 0, 0, withscores=True)
    late_s = max(0, round(now - float(oldest[0][1]))) if oldest else 0
    message = f"{num} deliveries to go, the next one {late_s} s late"
    yield judged("webhooks", late_s < LATE_WEBHOOK_S, f"{message}; a gateway sends them", Level.WARNING)
    num_given_up = client.llen(names.GIVEN_UP_KEY)
    yield judged("webhooks", num_given_up == 0, f"{num_given_up} deliveries were given up", Level.WARNING)
    for raw in client.lrange(names.GIVEN_UP_KEY, 0, MAX_NAMED - 1):
        given_up = json.loads(raw)
        message = "{type} of job {job_id}, after {tries} tries: {reason}".format_map(given_up)
        yield Finding("webhooks", Level.WARNING, message)


def _contents(census: Census) -> Iterator[Finding]:
    kinds = ", ".join(f"{num} {kind}" for kind, num in sorted(census.num_keys.items())) or "none"
    yield judged("keys", census.is_complete, f"{kinds}{'' if census.is_complete else ', and more'}", Level.WARNING)
    statuses = ", ".join(f"{num} {status}" for status, num in sorted(census.num_jobs.items())) or "none"
    yield Finding("jobs", Level.OK, statuses)
    for leak, keys in census.leaks.items():
        named = ", ".join(keys[:MAX_NAMED]) + (", …" if len(keys) > MAX_NAMED else "")
        yield Finding("leaks", Level.PROBLEM, f"{len(keys)} {leak}: {named}")
    if not census.leaks:
        yield Finding("leaks", Level.OK, "none")


def _queues(client: redis.Redis, census: Census) -> Iterator[Finding]:
    """Say for every model how much waits and who serves it."""
    prefix = names.depth_key("")
    models = {str(key).removeprefix(prefix) for key in client.scan_iter(prefix + "*", count=500)} | set(census.num_open)
    for model in sorted(models):
        yield from _queue(client, model, census)


def _queue(client: redis.Redis, model: str, census: Census) -> Iterator[Finding]:
    now, _ = client.time()
    depth = int(client.get(names.depth_key(model)) or 0)
    num_workers = client.zcount(names.workers_key(model), now, "+inf")
    num_bells = sum(client.llen(names.queue_list(model, step)) for step in names.PRIORITY_STEPS)
    lists = [names.list_id(model, step) for step in names.PRIORITY_STEPS]
    num_held = sum(int(num or 0) for num in client.hmget(names.NUM_HELD_KEY, lists))
    message = f"{model}: {depth} queued or running, {num_bells} doorbells out, {num_held} held, {num_workers} workers"
    yield judged("queues", num_workers > 0 or depth == 0, message, Level.WARNING)
    (since,) = client.hmget(names.PAUSED_KEY, [model])
    if since is not None:
        paused_s = max(0, round(now - float(since)))
        message = f"{model}: paused {paused_s} s ago, its jobs wait; `visionq queue resume {model}` lets it go on"
        yield Finding("queues", Level.WARNING, message)
    drift = depth - census.num_open[model]
    if census.is_complete and abs(drift) > max(10, depth // 10):  # work goes on while the rows are counted
        yield Finding("queues", Level.PROBLEM, f"{model}: its depth is {depth}, its open jobs are {depth - drift}")
