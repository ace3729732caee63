"""Batches in Redis: what was asked, how far it is, and which runner has it. One Lua script per step, fenced."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files as resources
from typing import Annotated, Any, Final, Literal, cast

import redis.asyncio
from pydantic import BaseModel, ConfigDict, Field

from api_stub.contract import names
from api_stub.contract.job import MAX_DEADLINE_S
from api_stub.contract.wire import WireModel
from api_stub.gateway.keys import Caller
from api_stub.gateway.openai.files import FILE_PREFIX, FILE_TTL_S, FileRecord, files_key, page_of
from api_stub.gateway.openai.shapes import BatchCounts, BatchError, BatchErrors, BatchObject, BatchStatus
from api_stub.gateway.problems import Problem, invalid

BATCH_PREFIX: Final = names.PREFIX + "gateway:batch:"
#: ZSET batch id -> Redis time at which a runner may take it: all that are not final.
OPEN_KEY: Final = names.PREFIX + "gateway:batches"
Fields = dict[str, str | int]
BATCH_TTL_S: Final = 30 * 86_400
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TIMES: Final = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class BatchRequest(BaseModel):
    """What `POST /v1/batches` takes. `completion_window`: number and s, m, h or d, 7 days at most."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    input_file_id: str
    endpoint: Literal["/v1/chat/completions"]
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}[smhd]$")]
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    @property
    def window_s(self) -> int:
        """The window in seconds. Raises Problem."""
        match = _WINDOW.fullmatch(self.completion_window)
        seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
        if not 0 < seconds <= MAX_DEADLINE_S:
            raise invalid("completion_window", f"at most {MAX_DEADLINE_S / 86_400:g} days")
        return seconds


class BatchOrder(WireModel):
    """What was asked, by whom; it never changes. `models`, `buckets`, `max_in_flight`: what the key may use."""

    id: str
    tenant: str
    is_anonymous: bool
    models: tuple[str, ...] | None = None
    buckets: tuple[str, ...] | None = None
    max_in_flight: int = 0
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None

    @property
    def caller(self) -> Caller:
        """Who asked, with the rights of then."""
        return Caller(
            tenant=self.tenant,
            is_anonymous=self.is_anonymous,
            max_in_flight=self.max_in_flight,
            models=None if self.models is None else frozenset(self.models),
            buckets=None if self.buckets is None else frozenset(self.buckets),
        )


class Checkpoint(WireModel):
    """Everything before it is in segments: lines of the input, its bytes, lines answered and not answered.

    `outputs`, `errors`: the objects that hold what was written so far. `total`: lines of the input; 0: not counted yet.
    """

    total: int = 0
    line: int = 0
    offset: int = 0
    completed: int = 0
    failed: int = 0
    outputs: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as Redis holds it."""

    order: BatchOrder
    checkpoint: Checkpoint
    status: BatchStatus
    fields: Mapping[str, str]

    @property
    def reached(self) -> int:
        """The last line that a runner began with."""
        return int(self.fields.get("reached", 0))

    @property
    def public(self) -> BatchObject:
        """What the API shows of it."""
        times = {f"{name}_at": int(at) for name in _TIMES if (at := self.fields.get(f"{name}_at"))}
        shown = self.order.model_dump(include=_SHOWN)
        counts = {name: int(self.fields.get(name, 0)) for name in ("total", "completed", "failed")}
        errors = self.fields.get("errors")
        return BatchObject(
            status=self.status,
            request_counts=BatchCounts(**counts),
            errors=BatchErrors.model_validate_json(errors) if errors else None,
            output_file_id=self.fields.get("output_file_id"),
            error_file_id=self.fields.get("error_file_id"),
            **shown,
            **times,
        )


_SHOWN: Final = {
    "id", "endpoint", "input_file_id", "completion_window", "created_at", "expires_at", "metadata",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lease:
    """A runner's hold of a batch."""

    batch_id: str
    fence: int


class LeaseLost(Exception):
    """Raised when somebody else has the batch, or it has ended."""


class BatchStore:
    """One event loop. Raises redis.RedisError."""

    def __init__(self, commands: redis.asyncio.Redis, lease_s: float) -> None:
        self._commands, self._lease_s = commands, lease_s
        self._take, self._keep, self._fail, self._finish, self._cancel = (
            commands.register_script(_script(name)) for name in ("take", "keep", "fail", "finish", "cancel")
        )

    async def create(self, caller: Caller, request: BatchRequest) -> Batch:
        """Write a new batch; a runner may take it at once. Raises Problem."""
        now, window_s = int(time.time()), request.window_s
        order = BatchOrder(
            id=f"batch_{uuid.uuid4().hex}",
            tenant=caller.tenant,
            is_anonymous=caller.is_anonymous,
            models=None if caller.models is None else tuple(sorted(caller.models)),
            buckets=None if caller.buckets is None else tuple(sorted(caller.buckets)),
            max_in_flight=caller.max_in_flight,
            created_at=now,
            expires_at=now + window_s,
            **request.model_dump(),
        )
        async with self._commands.pipeline(transaction=True) as step:
            step.hset(BATCH_PREFIX + order.id, mapping={"order": order.to_json(), "status": "validating"})
            step.zadd(OPEN_KEY, {order.id: now})
            step.zadd(batches_key(caller.tenant), {order.id: now})
            step.expire(batches_key(caller.tenant), BATCH_TTL_S)
            await step.execute()
        return Batch(order, Checkpoint(), "validating", {})

    async def load(self, batch_id: str) -> Batch | None:
        """Return a batch, whoever asks."""
        found: Any = await self._commands.hgetall(BATCH_PREFIX + batch_id)
        fields: dict[str, str] = found
        if "order" not in fields:
            return None
        order = BatchOrder.model_validate_json(fields["order"])
        checkpoint = Checkpoint.model_validate_json(fields.get("checkpoint", "{}"))
        status = cast("BatchStatus", fields["status"])
        return Batch(order, checkpoint, status, fields)

    async def find(self, caller: Caller, batch_id: str) -> Batch:
        """Return a batch that the caller may see. Raises Problem (404)."""
        batch = await self.load(batch_id)
        if batch is None or not caller.sees(batch.order.tenant):
            raise Problem(HTTPStatus.NOT_FOUND, "batch_not_found", f"no batch {batch_id[:80]!r}")
        return batch

    async def list_batches(self, caller: Caller, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Return a page of the caller's batches, newest first, and whether there are more. Raises Problem."""
        page = await page_of(self._commands, batches_key(caller.tenant), after, limit)
        found = [await self.load(batch_id) for batch_id in page.ids]
        return [batch for batch in found if batch is not None], page.has_more

    async def cancel(self, batch_id: str) -> str:
        """Ask for a batch's end; return its status before."""
        return str(await self._cancel(keys=[BATCH_PREFIX + batch_id]))

    async def take(self) -> Lease | None:
        """Take the batch that waited longest; None when none waits."""
        taken: list[Any] = await self._take(keys=[OPEN_KEY], args=[self._lease_s, BATCH_PREFIX])
        return Lease(str(taken[0]), int(taken[1])) if taken else None

    async def keep(self, lease: Lease, fields: Fields, status: str = "") -> str:
        """Write fields, lengthen the lease, return the status. Raises LeaseLost."""
        return await self._kept(lease, self._lease_s, status, fields)

    async def give_back(self, lease: Lease) -> None:
        """Let another runner go on at once."""
        await self._kept(lease, 0, "", {})

    async def count_mistake(self, lease: Lease, pause_s: float) -> int:
        """Return how many mistakes there were since the batch last came further; it waits before it is taken again.

        Raises LeaseLost.
        """
        keys = [OPEN_KEY, BATCH_PREFIX + lease.batch_id]
        num_mistakes = int(await self._fail(keys=keys, args=[lease.batch_id, lease.fence, pause_s]))
        if not num_mistakes:
            raise LeaseLost
        return num_mistakes

    async def finish(
        self, lease: Lease, tenant: str, status: BatchStatus, fields: Fields, made: Sequence[FileRecord] = ()
    ) -> None:
        """End a batch and announce its files. Raises LeaseLost."""
        files = [value for record in made for value in (record.id, record.to_json())]
        head: list[str | int] = [lease.batch_id, lease.fence, status, BATCH_TTL_S, FILE_PREFIX, FILE_TTL_S, len(made)]
        arguments: list[str | int] = [*head, *files]
        keys = [OPEN_KEY, BATCH_PREFIX + lease.batch_id, files_key(tenant)]
        if not await self._finish(keys=keys, args=[*arguments, *_flat(fields)]):
            raise LeaseLost

    async def _kept(self, lease: Lease, lease_s: float, status: str, fields: Fields) -> str:
        arguments: list[str | int | float] = [lease.batch_id, lease.fence, lease_s, status, *_flat(fields)]
        known = str(await self._keep(keys=[OPEN_KEY, BATCH_PREFIX + lease.batch_id], args=arguments))
        if not known:
            raise LeaseLost
        return known


def errors_json(*errors: BatchError) -> str:
    """Return why a batch was refused, as it is kept."""
    return BatchErrors(data=list(errors)).model_dump_json()


def batches_key(tenant: str) -> str:
    """ZSET batch id -> time of its creation: a tenant's batches."""
    return f"{names.PREFIX}gateway:batches:{tenant}"


def _flat(fields: Fields) -> list[str | int]:
    return [value for item in fields.items() for value in item]


def _script(name: str) -> str:
    return resources("api_stub.gateway").joinpath("scripts", f"batch_{name}.lua").read_text("utf-8")
