"""What every request passes: a bound on its body, security headers on its answer, a line in the log, a metric.

A body is bounded in size, in time, and in what all requests hold together.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_stub.gateway.forwarded import path_below
from api_stub.gateway.keys import KeyRing
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.problems import Problem, problem_of, too_large
from api_stub.gateway.sse import MEDIA_TYPE as EVENT_STREAM
from api_stub.settings import GatewaySettings

#: When a request that found no room should come again.
NO_ROOM_RETRY_S: Final = 2

logger = logging.getLogger("api_stub.gateway.access_log")

SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: Asked every few seconds by machines: counted, not logged.
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_OF_A_BODY: Final = frozenset({b"content-type", b"content-length", b"transfer-encoding"})
#: Their bodies mean nothing.
_READING: Final = frozenset({"GET", "HEAD"})
#: That much of a body that nobody wants is passed over.
_MAX_IGNORED_BYTES: Final = 64 * 1024
#: Without it the server reads the rest of an unread body, however long, before it takes the next request.
_CLOSE: Final = {"Connection": "close"}
#: Where a form goes to disk; the other routes read every body into memory, whatever it calls itself.
_FORMS: Final = re.compile(r"/v1/(jobs|jobs/[^/]+|files|uploads/inline)")


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


class GatewayMiddleware:
    """ASGI middleware, outermost but for CORS and `Forwarded`."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, keys: KeyRing, metrics: Metrics) -> None:
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics
        self._budget = BodyBudget(settings.api_max_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_stranger, is_long = self._is_stranger(headers), _is_long(headers)
        if is_stranger:
            scope, receive = _bodiless(scope, receive)
        body = self._body(scope, Headers(scope=scope), receive)
        answer = _Response(scope, body, may_send_on=lambda: is_long and (is_stranger or not body.is_whole))
        watched = answer.watched(send)
        try:
            await self._app(scope, body, watched)
        except Exception as error:
            # The framework's own answer to a mistake is made outside of this, without these headers.
            if not answer.is_begun:
                await _answer_mistake(error, scope, receive, watched)
            raise
        finally:
            body.close()
            self._tell(answer)

    def _is_stranger(self, headers: Headers) -> bool:
        """Whether no route that reads a body would serve the caller. FastAPI reads bodies before it asks for keys."""
        scheme, key = get_authorization_scheme_param(headers.get("authorization"))
        return len(self._keys) > 0 and (scheme.lower() != "bearer" or self._keys.caller(key) is None)

    def _body(self, scope: Scope, headers: Headers, receive: Receive) -> BoundedBody:
        max_bytes, budget = self._bound(scope, headers)
        return BoundedBody(receive, _announced(headers), max_bytes, self._settings.api_body_s, budget)

    def _bound(self, scope: Scope, headers: Headers) -> tuple[int, BodyBudget | None]:
        """Return how long a body may be, and what it counts against."""
        if scope["method"] in _READING:
            return _MAX_IGNORED_BYTES, None
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if is_form and _FORMS.fullmatch(path_below(scope)):
            return self._settings.api_max_upload_bytes, None
        return self._settings.api_max_body_bytes, self._budget

    def _tell(self, answer: _Response) -> None:
        seconds = time.monotonic() - answer.begun
        method, route = answer.scope["method"], _route(answer.scope)
        self._metrics.answered(method, route, answer.status, seconds, is_stream=answer.is_stream)
        state = answer.scope.get("state", {})
        code = state.get("problem") or ("internal" if answer.status >= 500 else None)
        if code is not None:
            self._metrics.failed(code)
        if route not in _QUIET:
            facts = {"action": "answer", "method": method, "route": route, "status": answer.status}
            who = {name: value for name, value in (("tenant", state.get("tenant")), ("code", code)) if value}
            logger.info("request", extra=facts | who | {"duration_s": round(seconds, 4)})


class CrossOrigin(CORSMiddleware):
    """CORS, around the guard: a page must be able to read its refusals, too. Answers preflights by itself."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a preflight, whose body nobody reads."""
        response = super().preflight_response(request_headers)
        if _is_long(request_headers):
            response.headers.update(_CLOSE)
        return response


def _announced(headers: Headers) -> int:
    num_bytes = headers.get("content-length", "0")
    return int(num_bytes) if num_bytes.isdecimal() else 0


def _is_long(headers: Headers) -> bool:
    return "transfer-encoding" in headers or _announced(headers) > _MAX_IGNORED_BYTES


def _bodiless(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """Return a request as if it had no body. What the client sends of one is never read."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _OF_A_BODY]
    is_told = False

    async def receive_nothing() -> Message:
        nonlocal is_told
        if is_told:
            return await _disconnect(receive)
        is_told = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return {**scope, "headers": headers}, receive_nothing


async def _disconnect(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


class _Response:
    """One answer on its way: its status, and what is added to its head."""

    def __init__(self, scope: Scope, body: BoundedBody, may_send_on: Callable[[], bool]) -> None:
        self.scope = scope
        self._body = body
        self._may_send_on = may_send_on
        self.is_begun = False
        self._is_replaced = False
        self.begun = time.monotonic()
        self.status = 500
        self.is_stream = False

    def watched(self, send: Send) -> Send:
        async def watched_send(message: Message) -> None:
            if self._is_replaced:
                return
            if message["type"] == "http.response.start":
                self.is_begun = True
                problem = self._body.problem
                if problem is not None and message["status"] != problem.status:
                    # FastAPI takes whatever stops its reading of a body for bad JSON.
                    self.scope.setdefault("state", {})["problem"] = problem.code
                    await problem.response()(self.scope, self._body, watched_send)
                    self._is_replaced = True
                    return
                self.status = message["status"]
                headers = MutableHeaders(scope=message)
                self.is_stream = headers.get("content-type", "").startswith(EVENT_STREAM)
                headers.update({name: value for name, value in SECURITY_HEADERS.items() if name not in headers})
                headers.setdefault("Cache-Control", "no-store")
                if self._may_send_on():
                    headers.update(_CLOSE)
            await send(message)

        return watched_send


async def _answer_mistake(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    problem = problem_of(error)
    scope.setdefault("state", {})["problem"] = problem.code
    await problem.response()(scope, receive, send)


def _route(scope: Scope) -> str:
    """Return the route's pattern: a path names jobs, and foreign paths would make endless metrics."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
