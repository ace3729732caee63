"""A job that was handed in: follow it, wait for it, ask about it, cancel it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import NoReturn

from api_stub.connections import store_errors
from api_stub.contract.event import Event, FinalEvent, JobCompleted
from api_stub.contract.result import Result
from api_stub.contract.view import JobView
from api_stub.cursor import TextCursor
from api_stub.errors import JobFailed, UnknownJob
from api_stub.follow import AsyncFollower, Follower
from api_stub.ledger.aio import AsyncLedger
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Cancelled


class JobHandle:
    """One job, by its id. Holds no connection of its own; making one asks nothing of Redis.

    Every method raises UnknownJob for an id that the ledger does not have, and StoreUnavailable.
    """

    def __init__(self, job_id: str, ledger: Ledger, follower: Follower) -> None:
        self.id = job_id
        self._ledger = ledger
        self._follower = follower

    def stream(self, timeout: float | None = None) -> Generator[str, None, None]:
        """Yield the answer's text as it arrives; may start late, survives lost connections.

        A new attempt's text is skipped as far as it equals what was yielded. Raises StreamRestarted when it differs,
        JobFailed when the job ends without a result, TimeoutError after `timeout` seconds without an event.
        """
        text = TextCursor()
        with closing(self.events(timeout=timeout)) as events:
            for event in events:
                if piece := text.take(event):
                    yield piece

    def events(self, after: int = 0, timeout: float | None = None) -> Generator[Event, None, None]:
        """Yield the job's events with a seq above `after`, the final one last. `timeout` bounds silence (TimeoutError).

        Once the stream has expired only the final event is left.
        """
        return self._follower.events(self.id, after, timeout)

    def result(self, timeout: float | None = None) -> Result:
        """Wait at most `timeout` seconds for the answer. Raises TimeoutError, JobFailed."""
        return _result(self._follower.ending(self.id, timeout))

    def status(self) -> JobView:
        """Return what the ledger knows now."""
        with store_errors():
            view = self._ledger.view(self.id)
        return view or _unknown(self.id)

    def cancel(self) -> Cancelled:
        """Ask for the job's end: CANCELLED (it was queued), CANCELLING (its worker was told), FINAL (it had ended)."""
        with store_errors():
            answer = self._ledger.cancel(self.id)
        return _unknown(self.id) if answer is Cancelled.UNKNOWN else answer

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"


class AsyncJobHandle:
    """`JobHandle` for asyncio: same methods, same meanings, same errors."""

    def __init__(self, job_id: str, ledger: AsyncLedger, follower: AsyncFollower) -> None:
        self.id = job_id
        self._ledger = ledger
        self._follower = follower

    async def stream(self, timeout: float | None = None) -> AsyncGenerator[str, None]:
        """See `JobHandle.stream`. Close the generator (`contextlib.aclosing`) when you leave it early."""
        text = TextCursor()
        async with aclosing(self.events(timeout=timeout)) as events:
            async for event in events:
                if piece := text.take(event):
                    yield piece

    def events(self, after: int = 0, timeout: float | None = None) -> AsyncGenerator[Event, None]:
        """See `JobHandle.events`. Close the generator (`contextlib.aclosing`) when you leave it early."""
        return self._follower.events(self.id, after, timeout)

    async def result(self, timeout: float | None = None) -> Result:
        """See `JobHandle.result`."""
        return _result(await self._follower.ending(self.id, timeout))

    async def status(self) -> JobView:
        """See `JobHandle.status`."""
        with store_errors():
            view = await self._ledger.view(self.id)
        return view or _unknown(self.id)

    async def cancel(self) -> Cancelled:
        """See `JobHandle.cancel`."""
        with store_errors():
            answer = await self._ledger.cancel(self.id)
        return _unknown(self.id) if answer is Cancelled.UNKNOWN else answer

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"


def _result(ending: FinalEvent) -> Result:
    if isinstance(ending, JobCompleted):
        return ending.result
    raise JobFailed(ending.error.code.value, ending.error.message, ending.error.retryable)


def _unknown(job_id: str) -> NoReturn:
    raise UnknownJob(f"no job {job_id!r}: never submitted, not adopted yet, or its record has expired")
