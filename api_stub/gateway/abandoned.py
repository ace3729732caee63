"""Completions whose client has left: kept some seconds for the same question from the same caller, then cancelled.

A client behind a proxy that gives up before its answer asks again. Cancelled, the job would lose its place in the queue
each time and never come to its end. What is kept is written down in Redis, so the repetition may reach any gateway. The
gateway that was left cancels; when it dies or stops meanwhile, the job runs to its end.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from importlib.resources import files
from typing import Final

import redis
import redis.asyncio

from api_stub.contract import names
from api_stub.contract.status import JobStatus
from api_stub.ledger.aio import AsyncLedger

logger = logging.getLogger(__name__)

#: Jobs kept per tenant; further ones are cancelled at once.
MAX_KEPT: Final = 256
CANCEL_S: Final = 5.0
#: How long after its time an entry of a gateway that died lies about.
_LINGER_S: Final = 60.0


class Abandoned:
    """`close()` on the loop that uses it. `keep_s` 0: whoever leaves cancels at once."""

    def __init__(self, commands: redis.asyncio.Redis, ledger: AsyncLedger, keep_s: float) -> None:
        self._ledger, self._keep_s = ledger, keep_s
        self._keep = commands.register_script(_script("keep"))
        self._take = commands.register_script(_script("take_kept"))
        self._drop = commands.register_script(_script("drop_kept"))
        self._waiting: set[asyncio.Task[None]] = set()

    async def take(self, tenant: str, asked: str) -> str | None:
        """Return the job that is kept for a question and stop keeping it; None: ask anew. Raises redis.RedisError."""
        if self._keep_s <= 0:
            return None
        job_id = str(await self._take(keys=[_key(tenant)], args=[asked]))
        view = await self._ledger.view(job_id) if job_id else None
        if view is None or view.status is JobStatus.CANCELLED:
            return None
        logger.info("abandoned job given to a repeated request", extra={"action": "adopt", "job_id": job_id})
        return job_id

    async def leave(self, job_id: str, tenant: str, asked: str) -> None:
        """Keep a job for its question's repetition, or cancel it where that cannot be. Raises nothing."""
        entry = f"{asked} {job_id}"
        try:
            async with asyncio.timeout(CANCEL_S):
                is_kept = self._keep_s > 0 and await self._kept(tenant, entry)
        except (redis.RedisError, TimeoutError) as error:
            is_kept = False
            logger.warning(
                "abandoned job not kept for a repeated request", extra=_facts(job_id) | {"error": type(error).__name__}
            )
        if not is_kept:
            await self.cancel(job_id)
            return
        task = asyncio.create_task(self._cancel_later(job_id, tenant, entry))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def cancel(self, job_id: str) -> None:
        """Cancel a job at once. Raises nothing."""
        try:
            async with asyncio.timeout(CANCEL_S):
                await self._ledger.cancel(job_id)
            logger.info("abandoned job cancelled", extra=_facts(job_id))
        except (redis.RedisError, TimeoutError) as error:
            logger.warning("abandoned job not cancelled", extra=_facts(job_id) | {"error": type(error).__name__})

    async def close(self) -> None:
        """Stop waiting. What is kept stays so: its caller may ask another gateway."""
        for task in tuple(self._waiting):
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _kept(self, tenant: str, entry: str) -> bool:
        arguments: list[str | int] = [entry, round(self._keep_s * 1000), MAX_KEPT, round(_LINGER_S * 1000)]
        return bool(await self._keep(keys=[_key(tenant)], args=arguments))

    async def _cancel_later(self, job_id: str, tenant: str, entry: str) -> None:
        left_s = self._keep_s
        while left_s > 0:  # again when the repetition has left, too, here or at another gateway: its time counts
            await asyncio.sleep(left_s)
            try:
                async with asyncio.timeout(CANCEL_S):
                    left_s = int(await self._drop(keys=[_key(tenant)], args=[entry])) / 1000
            except (redis.RedisError, TimeoutError) as error:
                # Nobody may be waiting for it; somebody may. It runs to its end.
                logger.warning("abandoned job not cancelled", extra=_facts(job_id) | {"error": type(error).__name__})
                return
        if left_s == 0:
            await self.cancel(job_id)


def question_of(body: bytes) -> str:
    """Return what stands for a request's body: the same bytes, the same question. Takes 0.1 s for 32 MiB."""
    return hashlib.sha256(body).hexdigest()


def _facts(job_id: str) -> dict[str, object]:
    return {"action": "cancel", "job_id": job_id}


def _key(tenant: str) -> str:
    return f"{names.PREFIX}gateway:kept:{tenant}"


def _script(name: str) -> str:
    return files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")
