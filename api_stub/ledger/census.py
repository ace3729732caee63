"""A count of everything that visionq keeps in Redis, and of what nobody looks after any more.

Reads only, by SCAN, a bounded number of keys. Work goes on meanwhile, so whatever looks like a leak is looked at a
second time before it is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeVar

import redis

from api_stub.contract import names
from api_stub.contract.status import JobStatus

T = TypeVar("T")

BATCH: Final = 500
#: Ids that a report names per kind of leak.
MAX_NAMED: Final = 5
_FINAL: Final = frozenset(status.value for status in JobStatus if status.is_final)


@dataclass(slots=True)
class Census:
    """`num_keys` by kind of key, `num_jobs` by status, `num_open` by model; leaks by what is wrong, with the keys.

    `is_complete` is False when there are more keys than were looked at: sums then tell nothing.
    """

    num_keys: Counter[str] = field(default_factory=Counter)
    num_jobs: Counter[str] = field(default_factory=Counter)
    num_open: Counter[str] = field(default_factory=Counter)
    leaks: dict[str, list[str]] = field(default_factory=dict)
    is_complete: bool = True


def take_census(client: redis.Redis, max_keys: int) -> Census:
    """Look at up to `max_keys` keys. The client must decode replies."""
    census = Census()
    keys = client.scan_iter(names.PREFIX + "*", count=BATCH)
    suspects: dict[str, set[str]] = {}
    for batch in _batches(islice(keys, max_keys)):
        census.num_keys.update(map(kind_of, batch))
        for leak, inspect in _INSPECTIONS.items():
            suspects.setdefault(leak, set()).update(inspect(client, batch, census))
    census.is_complete = next(iter(keys), None) is None
    for leak, found in suspects.items():
        inspect = _INSPECTIONS[leak]
        again = [key for batch in _batches(sorted(found)) for key in inspect(client, batch, Census())]
        if again:
            census.leaks[leak] = again
    return census


def kind_of(key: str) -> str:
    """Return what a key is: `job` of `visionq:job:<id>`."""
    return key.removeprefix(names.PREFIX).partition(":")[0]


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _immortal_rows(client: redis.Redis, keys: Sequence[str], census: Census) -> list[str]:
    """Final jobs whose rows never expire."""
    rows = [key for key in keys if kind_of(key) == "job"]
    found = []
    for key, (status, model), ttl in _rows_with_ttl(client, rows):
        census.num_jobs[str(status)] += 1
        if status not in _FINAL and model is not None:
            census.num_open[model] += 1
        elif status in _FINAL and ttl == -1:
            found.append(key)
    return found


def _rows_with_ttl(client: redis.Redis, keys: Sequence[str]) -> Iterator[tuple[str, list[str | None], int]]:
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.hmget(key, ("status", "model"))
            pipeline.ttl(key)
        replies = pipeline.execute()
    yield from zip(keys, replies[::2], replies[1::2], strict=True)


def _unattended(client: redis.Redis, keys: Sequence[str], census: Census) -> list[str]:
    """Queued or running jobs that no doorbell, no line and no reaper has in mind."""
    rows = [key for key in keys if kind_of(key) == "job"]
    with client.pipeline(transaction=False) as pipeline:
        for key in rows:
            pipeline.hmget(key, ("status", "list", "tenant"))
        replies = pipeline.execute()
    opened = [(key, *reply) for key, reply in zip(rows, replies, strict=True) if reply[0] and reply[0] not in _FINAL]
    with client.pipeline(transaction=False) as pipeline:
        for key, _, list_id, tenant in opened:
            job_id = key.removeprefix(names.job_key(""))
            pipeline.zscore(names.DUE_KEY, job_id)
            pipeline.zscore(names.waiting_key(list_id), job_id)
            pipeline.zscore(names.held_key(list_id, tenant), job_id)
        scores = pipeline.execute()
    return [row[0] for i, row in enumerate(opened) if not any(s is not None for s in scores[3 * i : 3 * i + 3])]


def _orphaned_streams(client: redis.Redis, keys: Sequence[str], census: Census) -> list[str]:
    """Event streams that never expire and have no job."""
    streams = [key for key in keys if kind_of(key) == "events"]
    with client.pipeline(transaction=False) as pipeline:
        for key in streams:
            pipeline.ttl(key)
            pipeline.exists(names.job_key(key.removeprefix(names.events_key(""))))
        replies = pipeline.execute()
    return [
        key
        for key, ttl, is_known in zip(streams, replies[::2], replies[1::2], strict=True)
        if ttl == -1 and not is_known
    ]


def _jobless_entries(client: redis.Redis, keys: Sequence[str], census: Census) -> list[str]:
    """Members of queues and of the reapers' agenda that are no open job. Named `<key> <job id>`."""
    found = []
    for key in keys:
        place, _, named = key.partition(" ")
        if kind_of(place) not in {"waiting", "held", "due"}:
            continue
        members = [named] if named else [str(member) for member, _ in client.zscan_iter(place, count=BATCH)]
        for batch in _batches(members):
            with client.pipeline(transaction=False) as pipeline:
                for job_id in batch:
                    pipeline.zscore(place, job_id)
                    pipeline.hget(names.job_key(job_id), "status")
                replies = pipeline.execute()
            for job_id, score, status in zip(batch, replies[::2], replies[1::2], strict=True):
                if score is not None and (status is None or status in _FINAL):
                    found.append(f"{place} {job_id}")
    return found


_INSPECTIONS: Final[dict[str, Callable[[redis.Redis, Sequence[str], Census], list[str]]]] = {
    "finished jobs that never expire": _immortal_rows,
    "open jobs that nobody looks after": _unattended,
    "event streams without a job that never expire": _orphaned_streams,
    "queue entries without an open job": _jobless_entries,
}
