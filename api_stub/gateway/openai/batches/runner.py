"""Works off batches in the background of a gateway process, a few at a time, each under a lease."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

import redis

from api_stub.contract.error import ErrorCode
from api_stub.errors import StoreUnavailable
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.openai.batches.execution import BatchWork, abandon, facts
from api_stub.gateway.openai.batches.line_job import GatewayStops
from api_stub.gateway.openai.batches.store import BatchStore, Lease, LeaseLost
from api_stub.gateway.openai.shapes import BatchError

logger = logging.getLogger(__name__)

MAX_BATCHES: Final = 4
POLL_S: Final = 1.0
STOP_S: Final = 5.0
#: How often a batch may stop at a mistake of ours without coming further, and how long it waits after the first one;
#: the wait doubles, to 155 s in all.
MAX_MISTAKES: Final = 6
PAUSE_S: Final = 5.0


class BatchRunner:
    """`start()` and `close()` on the gateway's loop; `close` before the gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._store = BatchStore(gateway.commands, gateway.settings.lease_s)
        self._working: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for batches."""
        self._loop = asyncio.create_task(self._run(), name="batches")

    async def close(self) -> None:
        """Stop. Batches under way go to another runner."""
        self._is_stopping = True
        tasks = [task for task in (self._loop, *self._working) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)

    async def _run(self) -> None:
        while not self._is_stopping:
            lease = None
            try:
                if len(self._working) < MAX_BATCHES:
                    lease = await self._store.take()
            except redis.RedisError as error:
                logger.warning("due batches not read", extra={"action": "batch", "error": type(error).__name__})
            if lease is None:
                await asyncio.sleep(POLL_S)
                continue
            task = asyncio.create_task(self._work(lease))
            self._working.add(task)
            task.add_done_callback(self._working.discard)

    async def _work(self, lease: Lease) -> None:
        about = facts(lease.batch_id)
        try:
            batch = await self._store.load(lease.batch_id)
            if batch is not None:
                logger.info("batch taken", extra=about | {"fence": lease.fence, "line": batch.checkpoint.line})
                max_in_flight = self._gateway.settings.api_batch_in_flight
                await BatchWork(self._gateway, self._store, lease, batch, max_in_flight).run()
                logger.info("batch ended", extra=about)
        except (GatewayStops, asyncio.CancelledError):
            self._is_stopping = True
            with suppress(redis.RedisError, LeaseLost):
                await self._store.give_back(lease)
        except LeaseLost:
            logger.info("lease of a batch lost", extra=about)
        except (StoreUnavailable, redis.RedisError) as error:
            # Its lease ends, and a runner goes on from the checkpoint, however often: trouble passes.
            self._gateway.metrics.batch_put_down("unavailable")
            logger.warning("batch interrupted", extra=about | {"error": type(error).__name__})
        except Exception:
            logger.exception("batch failed", extra=about)
            await self._failed(lease)

    async def _failed(self, lease: Lease) -> None:
        """Let the batch be tried again later, or end it after too many mistakes of ours in a row."""
        about = facts(lease.batch_id)
        try:
            num_mistakes = await self._store.count_mistake(lease, PAUSE_S)
            self._gateway.metrics.batch_put_down("mistake")
            if num_mistakes >= MAX_MISTAKES:
                message = f"a mistake of the server stopped it {num_mistakes} times in a row; its log says more"
                reason = BatchError(code=ErrorCode.INTERNAL.value, message=message)
                await abandon(self._gateway, self._store, lease, reason)
                self._gateway.metrics.batch_put_down("given_up")
                logger.error("batch given up", extra=about | {"mistakes": num_mistakes})
        except LeaseLost:
            logger.info("lease of a batch lost", extra=about)
        except redis.RedisError as error:
            logger.warning("batch interrupted", extra=about | {"error": type(error).__name__})
