"""A request's body on its way in: bounded in size, in time, and in what all requests hold together."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final

from starlette.types import Message, Receive

from api_stub.gateway.problems import Problem, too_large

#: When a request that found no room should come again.
NO_ROOM_RETRY_S: Final = 2


class BodyBudget:
    """Bytes of bodies that are in memory now. One event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count bytes that came. Raises Problem (503) when there is no room for them."""
        # Nobody waits for room: requests that wait for each other's would never get it.
        if self.held_bytes + num_bytes > self._max_bytes:
            detail = "too many large bodies at once; upload media instead of sending them inside JSON"
            headers = {"Retry-After": str(NO_ROOM_RETRY_S), "Connection": "close"}
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "busy", detail, headers=headers)
        self.held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Uncount bytes that are gone."""
        self.held_bytes -= num_bytes


class BoundedBody:
    """An ASGI `receive` that raises Problem where the body would be read: 408, 413, 503. `close()` it.

    `announced` is the Content-Length, 0 when there is none. `budget` is None for bodies that go to disk. `problem` is
    what was raised: a framework between here and the route may have made something else of it. `is_whole` says that
    the body was read to its end.
    """

    def __init__(
        self, receive: Receive, announced: int, max_bytes: int, max_seconds: float, budget: BodyBudget | None
    ) -> None:
        self._receive = receive
        self._announced = announced
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._deadline = asyncio.get_running_loop().time() + max_seconds
        self._budget = budget
        self._num_bytes = 0
        self.is_whole = False
        self.problem: Problem | None = None

    async def __call__(self) -> Message:
        """Return the next message."""
        if self.is_whole:
            return await self._receive()
        try:
            return await self._next()
        except Problem as problem:
            self.problem = problem
            raise

    def close(self) -> None:
        """The request is answered; its body is gone."""
        if self._budget is not None:
            self._budget.give_back(self._num_bytes)
            self._budget = None

    async def _next(self) -> Message:
        if self._announced > self._max_bytes:
            raise too_large(self._max_bytes)
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            detail = f"the body did not arrive within {self._max_seconds:g} s"
            headers = {"Connection": "close"}
            raise Problem(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", detail, headers=headers) from error
        num_bytes = len(message.get("body", b""))
        if self._num_bytes + num_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        if self._budget is not None:
            self._budget.take(num_bytes)
        self._num_bytes += num_bytes
        self.is_whole = not message.get("more_body", False)
        return message
