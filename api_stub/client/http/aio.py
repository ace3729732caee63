"""The transport through a gateway for one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path

import httpx

from api_stub.client.http import requests
from api_stub.client.http.requests import error_of
from api_stub.client.http.wire import (
    LIMITS,
    LIVE_S,
    SLACK_S,
    EventStreamParser,
    headers,
    send_async,
    stream_path,
    unreachable,
    upload,
    whole,
)
from api_stub.contract.event import Event, StreamGap
from api_stub.contract.job import Job
from api_stub.contract.result import Result
from api_stub.contract.view import JobSelection, JobView
from api_stub.cursor import EventCursor, ReadTimeouts, answered
from api_stub.errors import QueueFull, StoreUnavailable
from api_stub.ledger.rows import Cancelled, CancelledJobs, QueueChange


class AsyncHttpTransport:
    """Reaches jobs through a gateway, for asyncio. Connections are opened on first use."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url, self._api_key = url, api_key
        self._http = httpx.AsyncClient(base_url=url, headers=headers(api_key), limits=LIMITS)

    async def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""
        await send_async(self._http, requests.submit(job_id, job))

    async def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""
        return (await send_async(self._http, requests.retry(job_id))).job_id

    async def view(self, job_id: str) -> JobView:
        """Look at a job."""
        return await send_async(self._http, requests.view(job_id))

    async def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""
        is_final = (await self.view(job_id)).status.is_final
        return Cancelled.FINAL if is_final else await send_async(self._http, requests.cancel(job_id))

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""
        return await send_async(self._http, requests.cancel_jobs(tenant, wanted))

    async def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""
        await send_async(self._http, requests.delete(job_id))

    async def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""
        return await send_async(self._http, requests.pause(model))

    async def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""
        return await send_async(self._http, requests.resume(model))

    async def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""
        return await send_async(self._http, requests.purge(model))

    async def events(self, job_id: str, after: int, timeout: float | None) -> AsyncGenerator[Event, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence. Comes back with the
        last seq whenever the stream breaks.
        """
        cursor, timeouts = EventCursor(after), ReadTimeouts(timeout)
        while not cursor.is_finished:
            try:
                async with aclosing(self._arriving(job_id, cursor, timeouts)) as arriving:
                    async for arrived in arriving:
                        for event in cursor.take(arrived):
                            yield event
                            timeouts.heard()
                        if cursor.is_finished:
                            return
            except (StoreUnavailable, QueueFull) as error:
                await asyncio.sleep(timeouts.pause_s(error))

    async def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""
        timeouts, wait_s, longest_s = ReadTimeouts(timeout), 0.0, requests.WAIT_S
        while True:
            try:
                view = await send_async(self._http, requests.ending(job_id, wait_s))
                if view.status.is_final:
                    return answered(view.result, view.error)
                timeouts.connected()
            except (StoreUnavailable, QueueFull) as error:
                longest_s = requests.shorter_s(longest_s, error)
                await asyncio.sleep(timeouts.pause_s(error))
            wait_s = timeouts.wait_s(longest_s)

    async def dead(self, limit: int) -> tuple[JobView, ...]:
        """Not offered by gateways. Raises InvalidRequest."""
        requests.redis_only("dead")

    async def drop(self, job_id: str) -> bool:
        """Not offered by gateways. Raises InvalidRequest."""
        requests.redis_only("drop")

    async def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI.

        Files block, so it runs in another thread.
        """
        return await asyncio.to_thread(self._upload, path)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    def _upload(self, path: str | Path) -> str:
        with httpx.Client(base_url=self._url, headers=headers(self._api_key)) as http:
            return upload(http, path)

    async def _arriving(self, job_id: str, cursor: EventCursor, timeouts: ReadTimeouts) -> AsyncGenerator[Event, None]:
        wait_s = timeouts.wait_s(LIVE_S)
        timeout = httpx.Timeout(requests.ANSWER_S, connect=requests.CONNECT_S, read=wait_s)
        is_open = False
        try:
            async with self._http.stream("GET", stream_path(job_id, cursor.last_seq), timeout=timeout) as response:
                if response.status_code != HTTPStatus.OK:
                    await response.aread()
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        cursor.is_finished = True
                        return
                    raise error_of(whole(response))
                is_open = True
                timeouts.connected()
                parser = EventStreamParser()
                async with aclosing(response.aiter_raw()) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        for event in parser.feed(chunk):
                            if isinstance(event, StreamGap):
                                return
                            yield event
                        if timeouts.wait_s(LIVE_S) < wait_s - SLACK_S:
                            return
        except httpx.ReadTimeout as error:
            if not is_open:
                raise unreachable(error) from error
        except httpx.HTTPError as error:
            raise unreachable(error) from error
