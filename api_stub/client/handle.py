"""A job that was handed in: follow it, wait for it, ask about it, cancel it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing

from api_stub.client.transport import AsyncTransport, Transport
from api_stub.contract.event import Event
from api_stub.contract.result import Result
from api_stub.contract.view import JobView
from api_stub.cursor import TextCursor
from api_stub.ledger.rows import Cancelled


class JobHandle:
    """One job, by its id. Holds no connection of its own; making one asks nobody anything.

    Every method raises UnknownJob for an id that the ledger does not have, and StoreUnavailable; through a gateway also
    AccessRefused.
    """

    def __init__(self, job_id: str, transport: Transport) -> None:
        self.id = job_id
        self._transport = transport

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
        return self._transport.events(self.id, after, timeout)

    def result(self, timeout: float | None = None) -> Result:
        """Wait at most `timeout` seconds for the answer. Raises TimeoutError, JobFailed."""
        return self._transport.result(self.id, timeout)

    def status(self) -> JobView:
        """Return what the ledger knows now."""
        return self._transport.view(self.id)

    def cancel(self) -> Cancelled:
        """Ask for the job's end: CANCELLED (it was queued), CANCELLING (its worker was told), FINAL (it had ended)."""
        return self._transport.cancel(self.id)

    def delete(self) -> None:
        """Remove the job, its events and its result; uploads stay. Raises InvalidRequest unless it has ended."""
        self._transport.delete(self.id)

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"


class AsyncJobHandle:
    """`JobHandle` for asyncio: same methods, same meanings, same errors."""

    def __init__(self, job_id: str, transport: AsyncTransport) -> None:
        self.id = job_id
        self._transport = transport

    async def stream(self, timeout: float | None = None) -> AsyncGenerator[str, None]:
        """Yield the answer's text as it arrives; may start late, survives lost connections.

        A new attempt's text is skipped as far as it equals what was yielded. Raises StreamRestarted when it differs,
        JobFailed when the job ends without a result, TimeoutError after `timeout` seconds without an event. Close the
        generator (`contextlib.aclosing`) when you leave it early.
        """
        text = TextCursor()
        async with aclosing(self.events(timeout=timeout)) as events:
            async for event in events:
                if piece := text.take(event):
                    yield piece

    def events(self, after: int = 0, timeout: float | None = None) -> AsyncGenerator[Event, None]:
        """Yield the job's events with a seq above `after`, the final one last. `timeout` bounds silence (TimeoutError).

        Once the stream has expired only the final event is left. Close the generator (`contextlib.aclosing`) when you
        leave it early.
        """
        return self._transport.events(self.id, after, timeout)

    async def result(self, timeout: float | None = None) -> Result:
        """Wait at most `timeout` seconds for the answer. Raises TimeoutError, JobFailed."""
        return await self._transport.result(self.id, timeout)

    async def status(self) -> JobView:
        """Return what the ledger knows now."""
        return await self._transport.view(self.id)

    async def cancel(self) -> Cancelled:
        """Ask for the job's end: CANCELLED (it was queued), CANCELLING (its worker was told), FINAL (it had ended)."""
        return await self._transport.cancel(self.id)

    async def delete(self) -> None:
        """Remove the job, its events and its result; uploads stay. Raises InvalidRequest unless it has ended."""
        await self._transport.delete(self.id)

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"
