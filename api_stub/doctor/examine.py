"""The whole examination, in the order in which one would ask: the server, the settings, the workers, the contents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

import redis

from api_stub.contract import names
from api_stub.doctor.finding import Finding, Level, judged
from api_stub.doctor.server import server_findings
from api_stub.ledger import writable
from api_stub.ledger.census import MAX_NAMED, Census, take_census
from api_stub.ledger.config import LedgerConfig
from api_stub.ledger.verdicts import code_of

__all__ = ["Finding", "Level", "examine"]

#: After this kombu delivers an unacknowledged message once more. A result that is gone by then could run again.
VISIBILITY_TIMEOUT_S: Final = 600
#: A leaked message is older than any live worker lets it become.
OLD_UNACKED_S: Final = VISIBILITY_TIMEOUT_S + 120
#: A webhook that waits longer than this for its turn has no gateway that sends it.
LATE_WEBHOOK_S: Final = 60
_UNACKED: Final = "unacked"
_UNACKED_INDEX: Final = "unacked_index"


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
    told = " and ".join(sorted(leases, key=float))
    yield judged("settings", len(leases) == 1, f"VISIONQ_LEASE_S is {told} s; all processes must share one value")
    yield from _shared(client)


def _shared(client: redis.Redis) -> Iterator[Finding]:
    """Compare what the workers and gateways say that they sweep by."""
    now, _ = client.time()
    told = [str(member).split() for member in client.zrangebyscore(names.SETTINGS_KEY, now, "+inf")]
    values: dict[str, set[str]] = {}
    for name, _, value in (pair.partition("=") for pairs in told for pair in pairs):
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
