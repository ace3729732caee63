"""The queues as an operator sees them: jobs and workers per model, read from the ledger's public counters."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

import redis.asyncio

from api_stub.contract import names
from api_stub.contract.wire import WireModel

#: Models are found by scanning Redis for their counters; what was found is used this long.
LOOK_AGAIN_S: Final = 5.0
_SCAN_COUNT: Final = 1000


class QueueView(WireModel):
    """One model's queue. `depth`: queued and running jobs; `waiting`: those queued, with a doorbell.

    `paused`: true when an operator has paused it, else absent.
    """

    model: str
    depth: int
    waiting: int
    num_workers: int
    paused: Literal[True] | None = None


class Queues:
    """Reads all queues. One event loop."""

    def __init__(self, commands: redis.asyncio.Redis) -> None:
        self._commands = commands
        self._models: tuple[str, ...] = ()
        self._found_at = float("-inf")
        self._looking = asyncio.Lock()

    async def models(self) -> tuple[str, ...]:
        """Return the names of all models that have a queue or a worker, sorted."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now - self._found_at >= LOOK_AGAIN_S:
                depths = await self._names(names.depth_key(""))
                workers = await self._names(names.workers_key(""))
                self._models = tuple(sorted(depths | workers))
                self._found_at = now
            return self._models

    def forget(self) -> None:
        """Look for models anew at the next question."""
        self._found_at = float("-inf")

    async def is_paused(self, model: str) -> bool:
        """Tell whether an operator has paused a model's queue."""
        since: Any = await self._commands.hget(names.PAUSED_KEY, model)
        return since is not None

    async def views(self) -> list[QueueView]:
        """Read all queues now, paused ones also when they are empty."""
        paused: Any = await self._commands.hgetall(names.PAUSED_KEY)
        models = sorted({*await self.models(), *paused})
        seconds, _ = await self._commands.time()
        now = seconds + float(await self._commands.hget(names.WATCH_KEY, "ahead") or 0)
        async with self._commands.pipeline(transaction=False) as reads:
            for model in models:
                reads.get(names.depth_key(model))
                reads.zcount(names.workers_key(model), f"({now}", "+inf")
                for step in names.PRIORITY_STEPS:
                    reads.zcard(names.waiting_key(names.list_id(model, step)))
            replies = await reads.execute()
        width = 2 + len(names.PRIORITY_STEPS)
        rows = [replies[start : start + width] for start in range(0, len(replies), width)]
        return [
            QueueView(
                model=model,
                depth=int(depth or 0),
                waiting=sum(waiting),
                num_workers=num_workers,
                paused=True if model in paused else None,
            )
            for model, (depth, num_workers, *waiting) in zip(models, rows, strict=True)
        ]

    async def _names(self, prefix: str) -> set[str]:
        found = set()
        async for key in self._commands.scan_iter(match=f"{prefix}*", count=_SCAN_COUNT):
            name = str(key).removeprefix(prefix)
            if names.is_model_name(name):
                found.add(name)
        return found
