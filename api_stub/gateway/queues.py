"""The queues: jobs and workers of every known model, as an operator sees them or as far as they are one tenant's."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, Final, Literal

import redis.asyncio

from api_stub.contract import names
from api_stub.contract.wire import WireModel
from api_stub.gateway.keys import Caller
from api_stub.gateway.schemas import WorkerReply
from api_stub.ledger.aio import AsyncLedger

#: What was read about names is used this long. A name that is not among them is asked for by itself.
LOOK_AGAIN_S: Final = 1.0
_STEPS: Final = len(names.PRIORITY_STEPS)


class QueueView(WireModel):
    """One model's queue. `depth`: queued and running jobs; `waiting`: those queued, with a doorbell.

    A key that is no operator's sees its own jobs only; the workers are everybody's.
    `paused`: true when an operator has paused it, else absent. `serving`: for operators, what each worker serves.
    """

    model: str
    depth: int
    waiting: int
    num_workers: int
    paused: Literal[True] | None = None
    serving: tuple[WorkerReply, ...] | None = None


class Queues:
    """Reads all queues. One event loop. `listed`: names that are known without a worker."""

    def __init__(self, commands: redis.asyncio.Redis, ledger: AsyncLedger, listed: Sequence[str]) -> None:
        self._commands, self._ledger = commands, ledger
        self._listed = frozenset(listed)
        self._known: frozenset[str] = frozenset()
        self._found_at = float("-inf")
        self._looking = asyncio.Lock()

    async def models(self) -> tuple[str, ...]:
        """Return the known names, sorted: those that workers serve or did in the last day, and those listed."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now - self._found_at >= LOOK_AGAIN_S:
                self._known = await self._ledger.known() | self._listed
                self._found_at = now
            return tuple(sorted(self._known))

    async def is_known(self, model: str) -> bool:
        """Tell whether a name is among them."""
        if not names.is_model_name(model):
            return False
        return model in self._listed or model in await self.models() or model in await self._ledger.known(model)

    async def adapters(self, model: str) -> list[str]:
        """Return the names of the adapters that any worker of a model serves, sorted."""
        return sorted({name for serving in (await self._ledger.serving(model)).values() for name in serving.adapters})

    async def may_serve(self, model: str, adapter: str) -> bool:
        """Tell whether some worker of a model serves an adapter, or no worker is there that tells."""
        serving = (await self._ledger.serving(model)).values()
        return not serving or any(adapter in each.adapters for each in serving)

    def forget(self) -> None:
        """Look for models anew at the next question."""
        self._found_at = float("-inf")

    async def is_paused(self, model: str) -> bool:
        """Tell whether an operator has paused a model's queue."""
        since: Any = await self._commands.hget(names.PAUSED_KEY, model)
        return since is not None

    async def views(self, caller: Caller) -> list[QueueView]:
        """Read the queues now: for an operator all, paused ones too; else the caller's models and its own jobs."""
        paused: Any = await self._commands.hgetall(names.PAUSED_KEY)
        models = await self.models()
        if caller.is_operator:
            return await self._all(sorted({*models, *paused}), paused)
        return await self._own([model for model in models if caller.may_see(model)], caller.tenant, paused)

    async def _all(self, models: Sequence[str], paused: Collection[str]) -> list[QueueView]:
        now = await self._now()
        async with self._commands.pipeline(transaction=False) as reads:
            for model in models:
                reads.get(names.depth_key(model))
                reads.zcount(names.workers_key(model), f"({now}", "+inf")
                reads.hgetall(names.serves_key(model))
                for list_id in _lists(model):
                    reads.zcard(names.waiting_key(list_id))
            replies = _rows(await reads.execute(), 3 + _STEPS)
        return [
            QueueView(
                model=model,
                depth=int(depth or 0),
                waiting=sum(waiting),
                num_workers=num_workers,
                paused=True if model in paused else None,
                serving=WorkerReply.all_of(told) or None,
            )
            for model, (depth, num_workers, told, *waiting) in zip(models, replies, strict=True)
        ]

    async def _own(self, models: Sequence[str], tenant: str, paused: Collection[str]) -> list[QueueView]:
        """Count a tenant's jobs: those in its lines, and those that run or whose doorbells are out."""
        now = await self._now()
        async with self._commands.pipeline(transaction=False) as reads:
            for model in models:
                reads.hget(names.tenants_key(model), tenant)
                reads.zcount(names.workers_key(model), f"({now}", "+inf")
                for list_id in _lists(model):
                    reads.zcard(names.held_key(list_id, tenant))
                for list_id in _lists(model):
                    reads.zrange(names.waiting_key(list_id), 0, -1)  # few: the others are held
            replies = _rows(await reads.execute(), 2 + 2 * _STEPS)
        views = []
        for model, (in_flight, num_workers, *rest) in zip(models, replies, strict=True):
            held, waiting = sum(rest[:_STEPS]), [job_id for ids in rest[_STEPS:] for job_id in ids]
            num_waiting = await self._num_of(waiting, tenant) if in_flight else 0
            depth = held + int(in_flight or 0)
            is_paused: Literal[True] | None = True if model in paused else None
            views.append(
                QueueView(model=model, depth=depth, waiting=num_waiting, num_workers=num_workers, paused=is_paused)
            )
        return views

    async def _now(self) -> float:
        """Return the time on the ledger's clock, which never goes back."""
        seconds, _ = await self._commands.time()
        ahead: Any = await self._commands.hget(names.WATCH_KEY, "ahead")
        return float(seconds) + float(ahead or 0)

    async def _num_of(self, job_ids: Sequence[str], tenant: str) -> int:
        async with self._commands.pipeline(transaction=False) as reads:
            for job_id in job_ids:
                reads.hget(names.job_key(job_id), "tenant")
            return sum(owner == tenant for owner in await reads.execute())


def _lists(model: str) -> list[str]:
    return [names.list_id(model, step) for step in names.PRIORITY_STEPS]


def _rows(replies: Sequence[Any], width: int) -> list[Sequence[Any]]:
    return [replies[start : start + width] for start in range(0, len(replies), width)]
