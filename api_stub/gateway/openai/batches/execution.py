"""One runner's work on one batch: count its lines, answer them, write down how far it is, put the files together.

Whoever goes on after it starts at the last checkpoint. The jobs' ids follow from batch and line, so the lines after
that are submitted again as the same jobs, and their results are those that there already were.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final

import redis

from api_stub.errors import StorageRefused
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.openai.batches.line_job import Answered, EarlyEnd, Lineup
from api_stub.gateway.openai.batches.lines import (
    MAX_LINES,
    SEGMENT_BYTES,
    SEGMENT_LINES,
    BatchRefused,
    count_lines,
    delete_segments,
    join,
    lines_of,
    put_segment,
    request_id,
)
from api_stub.gateway.openai.batches.store import Batch, BatchStore, Checkpoint, Fields, Lease, LeaseLost, errors_json
from api_stub.gateway.openai.files import FileRecord, load, new_object
from api_stub.gateway.openai.shapes import BatchError

logger = logging.getLogger(__name__)

BEAT_S: Final = 1.0


@dataclass(slots=True)
class _Fresh:
    """Answers that are in no segment yet."""

    outputs: list[bytes] = field(default_factory=list)
    errors: list[bytes] = field(default_factory=list)
    last: Answered | None = None
    num_lines: int = 0
    num_bytes: int = 0

    @property
    def is_enough(self) -> bool:
        return self.num_lines >= SEGMENT_LINES or self.num_bytes >= SEGMENT_BYTES

    def add(self, answered: Answered) -> None:
        self.last = answered
        self.num_lines += 1
        self.num_bytes += len(answered.text)
        if answered.text:
            (self.outputs if answered.is_completed else self.errors).append(answered.text)


class BatchWork:
    """Use once, on one event loop. `max_in_flight`: jobs of the batch that are submitted and not answered."""

    def __init__(self, gateway: Gateway, store: BatchStore, lease: Lease, batch: Batch, max_in_flight: int) -> None:
        self._gateway, self._store, self._lease, self._order = gateway, store, lease, batch.order
        self._max_in_flight = max_in_flight
        self._done = batch.checkpoint
        self._reached = batch.reached
        self._fresh = _Fresh()
        self._lineup = Lineup(gateway, batch.order)
        self._window: deque[asyncio.Task[Answered]] = deque()

    async def run(self) -> None:
        """Work until the batch is final. Raises LeaseLost, GatewayStops, VisionqError, redis.RedisError."""
        work, beat = asyncio.create_task(self._work()), asyncio.create_task(self._beat())
        try:
            await asyncio.wait({work, beat}, return_when=asyncio.FIRST_COMPLETED)
            await (work if work.done() else beat)
        except Exception:
            with suppress(redis.RedisError, LeaseLost):
                await self._store.keep(self._lease, self._counts())  # what was begun may have to be cancelled
            raise
        finally:
            tasks = (work, beat, *self._window)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        try:
            record = await load(self._gateway, self._order.input_file_id)
            if record is None:
                raise BatchRefused(BatchError(code="file_not_found", message="the input file has been deleted"))
            if not self._done.total:
                self._done = Checkpoint(total=await count_lines(self._gateway, record))
            await self._keep("in_progress")
            await self._answer_all(record)
            await self._put_together()
        except (BatchRefused, StorageRefused) as error:
            reason = error.error if isinstance(error, BatchRefused) else BatchError(code=error.code, message=str(error))
            await self._lineup.end(EarlyEnd.CANCELLED)  # nothing more is submitted
            await self._store.keep(self._lease, self._counts())
            await abandon(self._gateway, self._store, self._lease, reason)

    async def _answer_all(self, record: FileRecord) -> None:
        async with aclosing(lines_of(self._gateway, record, self._done.line, self._done.offset)) as lines:
            while True:
                await self._lineup.room.acquire()  # before the line is read: few are in memory
                line = await anext(lines, None)
                if line is None:
                    break
                self._reached = max(self._reached, line.number)
                self._window.append(asyncio.create_task(self._lineup.answer(line)))
                while self._window and (len(self._window) >= self._max_in_flight or self._window[0].done()):
                    await self._collect()
        while self._window:
            await self._collect()
        await self._save()

    async def _collect(self) -> None:
        """Take in the answer of the oldest line under way: the output is in the input's order."""
        self._fresh.add(await self._window[0])
        self._window.popleft()
        if self._fresh.is_enough:
            await self._save()

    async def _save(self) -> None:
        """Put what is fresh into segments, then write down that it is there."""
        fresh = self._fresh
        if fresh.last is None:
            return
        line = fresh.last.line
        outputs = await self._segment("output", line.number, fresh.outputs)
        errors = await self._segment("error", line.number, fresh.errors)
        self._done = Checkpoint(
            total=self._done.total,
            line=line.number,
            offset=line.end,
            completed=self._done.completed + len(fresh.outputs),
            failed=self._done.failed + len(fresh.errors),
            outputs=self._done.outputs + outputs,
            errors=self._done.errors + errors,
        )
        self._fresh = _Fresh()
        await self._keep(mistakes=0)

    async def _segment(self, kind: str, number: int, lines: list[bytes]) -> tuple[str, ...]:
        if not lines:
            return ()
        # The fence is in the name: a runner that lost its lease does not write over another's.
        name = f"{self._order.id}/{self._lease.fence}-{number}-{kind}"
        uri = new_object(self._gateway, self._order.tenant, name)
        await put_segment(self._gateway, uri, lines)
        return (uri,)

    async def _put_together(self) -> None:
        await self._keep("finalizing")
        uris = {"output": self._done.outputs, "error": self._done.errors}
        made = {kind: await self._joined(kind, parts) for kind, parts in uris.items() if parts}
        status: Final = "completed" if self._lineup.early_end is None else self._lineup.early_end.value
        await self._store.finish(
            self._lease,
            self._order.tenant,
            status,
            self._counts() | {f"{kind}_file_id": record.id for kind, record in made.items()},
            made=tuple(made.values()),
        )
        await delete_segments(self._gateway, [*self._done.outputs, *self._done.errors])

    async def _joined(self, kind: str, uris: tuple[str, ...]) -> FileRecord:
        file_id = f"file-{uuid.uuid5(uuid.NAMESPACE_OID, f'{self._order.id} {self._lease.fence} {kind}').hex}"
        target = new_object(self._gateway, self._order.tenant, file_id)
        return FileRecord(
            id=file_id,
            tenant=self._order.tenant,
            uri=target,
            num_bytes=await join(self._gateway, uris, target),
            created_at=int(time.time()),
            filename=f"{self._order.id}_{kind}.jsonl",
            purpose="batch_output",
        )

    async def _beat(self) -> None:
        """Keep the lease, show the counts, and see whether the batch shall end early. Raises LeaseLost."""
        while True:
            try:
                if await self._store.keep(self._lease, self._counts()) == "cancelling":
                    await self._lineup.end(EarlyEnd.CANCELLED)
                elif time.time() >= self._order.expires_at:
                    await self._lineup.end(EarlyEnd.EXPIRED)
            except redis.RedisError as error:  # the lease is somebody else's when this takes too long
                logger.warning(
                    "lease of a batch not renewed", extra=facts(self._order.id) | {"error": type(error).__name__}
                )
            await asyncio.sleep(BEAT_S)

    async def _keep(self, status: str = "", **more: str | int) -> None:
        await self._store.keep(self._lease, self._counts() | {"checkpoint": self._done.to_json()} | more, status)

    def _counts(self) -> Fields:
        return {
            "total": self._done.total,
            "completed": self._done.completed + len(self._fresh.outputs),
            "failed": self._done.failed + len(self._fresh.errors),
            "reached": self._reached,
        }


async def abandon(gateway: Gateway, store: BatchStore, lease: Lease, reason: BatchError) -> None:
    """End a batch `failed`, without files, and cancel its jobs that wait or run. Raises LeaseLost, redis.RedisError."""
    with suppress(ValueError):  # what cannot be read may be why it is abandoned
        batch = await store.load(lease.batch_id)
        begun = range(0) if batch is None else range(batch.checkpoint.line + 1, batch.reached + 1)
        for number in begun[-MAX_LINES:]:
            await gateway.ledger.cancel(request_id(lease.batch_id, number))
    await store.finish(lease, "", "failed", {"errors": errors_json(reason)})


def facts(batch_id: str) -> dict[str, object]:
    """What every line of the log about a batch says."""
    return {"action": "batch", "batch_id": batch_id}
