"""What one caller may take: requests per minute and unfinished jobs, counted in Redis for all replicas."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import Final

import redis.asyncio

from api_stub.contract import names
from api_stub.contract.status import JobStatus
from api_stub.gateway.keys import Caller
from api_stub.gateway.problems import too_many

#: When a caller with too many unfinished jobs should ask again.
IN_FLIGHT_RETRY_S: Final = 5.0
_FINAL: Final = tuple(status.value for status in JobStatus if status.is_final)


class Limits:
    """Safe to share between tasks of one loop. Raises redis.RedisError when Redis is away: nobody passes uncounted."""

    def __init__(self, commands: redis.asyncio.Redis) -> None:
        self._rate = commands.register_script(_script("rate"))
        self._in_flight = commands.register_script(_script("in_flight"))
        self._commands = commands

    async def count_request(self, caller: Caller) -> None:
        """Count one request. Raises Problem (429) above the caller's rate."""
        if caller.rate_per_minute <= 0:
            return
        wait_ms = int(await self._rate(keys=[_key("rate", caller)], args=[caller.rate_per_minute]))
        if wait_ms > 0:
            raise too_many("rate_limited", f"more than {caller.rate_per_minute} requests in a minute", wait_ms / 1000)

    async def reserve(self, caller: Caller, job_id: str) -> None:
        """Make room for a job, before it is submitted. Raises Problem (429) above the caller's cap."""
        if caller.max_in_flight <= 0:
            return
        arguments = [job_id, caller.max_in_flight, names.job_key(""), *_FINAL]
        if not await self._in_flight(keys=[_key("in_flight", caller)], args=arguments):
            detail = f"{caller.max_in_flight} unfinished jobs are the limit of this key"
            raise too_many("too_many_jobs", detail, IN_FLIGHT_RETRY_S)

    async def rename(self, caller: Caller, place: str, job_id: str) -> None:
        """Give the room made for `place` to a job whose id was not known before."""
        if caller.max_in_flight > 0:
            async with self._commands.pipeline(transaction=True) as step:
                step.zrem(_key("in_flight", caller), place)
                step.zadd(_key("in_flight", caller), {job_id: time.time()})
                await step.execute()

    async def release(self, caller: Caller, job_id: str) -> None:
        """Give the room back: the job was not taken."""
        if caller.max_in_flight > 0:
            await self._commands.zrem(_key("in_flight", caller), job_id)


def _key(what: str, caller: Caller) -> str:
    return f"{names.PREFIX}gateway:{what}:{caller.tenant}"


def _script(name: str) -> str:
    return files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")
