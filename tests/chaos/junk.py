"""Junk in the broker: entries as nobody should write them, in its lists and in its table of held messages.

Each must cost itself only: it is dropped, or refused under the id that it names.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import redis

from api_stub.contract import names
from tests.chaos.leaks import JUNK_TAG, MODEL
from tests.fuzz_entries import entry, expected
from tests.servers import RedisServer

_UNACKED: Final = "unacked"


@dataclass(frozen=True, slots=True)
class Junk:
    """An entry, the list it goes to, and the id of the job that it makes, if it makes one."""

    raw: bytes
    step: int
    job_id: str | None


def draw(rng: Random, count: int) -> list[Junk]:
    """Return entries that a seed makes."""
    thrown = []
    for _ in range(count):
        raw = entry(rng)
        job_id, kind = expected(raw)
        thrown.append(Junk(raw, rng.choice(names.PRIORITY_STEPS), job_id if kind == "plain" else None))
    return thrown


def throw(server: RedisServer, thrown: Sequence[Junk]) -> bool:
    """Put all of them into Redis at once; False: it takes no writes now, and has none of them."""
    try:
        with server.client() as client, client.pipeline() as pipe:
            for number, each in enumerate(thrown):
                pipe.lpush(names.queue_list(MODEL, each.step), each.raw)
                tag = f"{JUNK_TAG}{time.time_ns()}-{number}"
                pipe.hset(_UNACKED, tag, each.raw)
                pipe.zadd("unacked_index", {tag: 1})  # held since long ago: every worker looks at it
            pipe.execute()
    except redis.RedisError:
        return False
    return True
