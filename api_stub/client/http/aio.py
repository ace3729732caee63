"""The transport through a gateway for one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path

import httpx

from api_stub.client.http import requests
from api_stub.client.http.requests import refusal
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
from api_stub.cursor import EventCursor, Patience, answered
from api_stub.errors import QueueFull, StoreUnavailable
from api_stub.ledger.rows import Cancelled, CancelledJobs, QueueChange


class AsyncHttpTransport:
    """See `AsyncTransport`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url, self._api_key = url, api_key
        self._http = httpx.AsyncClient(base_url=url, headers=headers(api_key), limits=LIMITS)

    async def submit(self, job_id: str, job: Job) -> None:
        """See `Transport.submit`."""
        await send_async(self._http, requests.submit(job_id, job))

    async def retry(self, job_id: str) -> str:
        """See `Transport.retry`."""
        return (await send_async(self._http, requests.retry(job_id))).job_id

    async def view(self, job_id: str) -> JobView:
        """See `Transport.view`."""
        return await send_async(self._http, requests.view(job_id))

    async def cancel(self, job_id: str) -> Cancelled:
        """See `Transport.cancel`."""
        is_final = (await self.view(job_id)).status.is_final
        return Cancelled.FINAL if is_final else await send_async(self._http, requests.cancel(job_id))

    async def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """See `Transport.cancel_jobs`."""
        return await send_async(self._http, requests.cancel_jobs(tenant, wanted))

    async def delete(self, job_id: str) -> None:
        """See `Transport.delete`."""
        await send_async(self._http, requests.delete(job_id))

    async def pause(self, model: str) -> QueueChange:
        """See `Transport.pause`."""
        return await send_async(self._http, requests.pause(model))

    async def resume(self, model: str) -> QueueChange:
        """See `Transport.resume`."""
        return await send_async(self._http, requests.resume(model))

    async def purge(self, model: str) -> int:
        """See `Transport.purge`."""
        return await send_async(self._http, requests.purge(model))

    async def events(self, job_id: str, after: int, timeout: float | None) -> AsyncGenerator[Event, None]:
        """See `HttpTransport.events`."""
        cursor, patience = EventCursor(after), Patience(timeout)
        while not cursor.is_finished:
            try:
                async with aclosing(self._arriving(job_id, cursor, patience)) as arriving:
                    async for arrived in arriving:
                        for event in cursor.take(arrived):
                            yield event
                            patience.heard()
                        if cursor.is_finished:
                            return
            except (StoreUnavailable, QueueFull) as error:
                await asyncio.sleep(patience.pause_s(error))

    async def result(self, job_id: str, timeout: float | None) -> Result:
        """See `Transport.result`."""
        patience, wait_s, longest_s = Patience(timeout), 0.0, requests.WAIT_S
        while True:
            try:
                view = await send_async(self._http, requests.ending(job_id, wait_s))
                if view.status.is_final:
                    return answered(view.result, view.error)
                patience.connected()
            except (StoreUnavailable, QueueFull) as error:
                longest_s = requests.shorter_s(longest_s, error)
                await asyncio.sleep(patience.pause_s(error))
            wait_s = patience.wait_s(longest_s)

    async def dead(self, limit: int) -> tuple[JobView, ...]:
        """See `HttpTransport.dead`."""
        requests.redis_only("dead")

    async def drop(self, job_id: str) -> bool:
        """See `HttpTransport.drop`."""
        requests.redis_only("drop")

    async def upload(self, path: str | Path) -> str:
        """See `Transport.upload`. Files block, so it runs in another thread."""
        return await asyncio.to_thread(self._upload, path)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._http.aclose()

    def _upload(self, path: str | Path) -> str:
        with httpx.Client(base_url=self._url, headers=headers(self._api_key)) as http:
            return upload(http, path)

    async def _arriving(self, job_id: str, cursor: EventCursor, patience: Patience) -> AsyncGenerator[Event, None]:
        wait_s = patience.wait_s(LIVE_S)
        timeout = httpx.Timeout(requests.ANSWER_S, connect=requests.CONNECT_S, read=wait_s)
        is_open = False
        try:
            async with self._http.stream("GET", stream_path(job_id, cursor.last_seq), timeout=timeout) as response:
                if response.status_code != HTTPStatus.OK:
                    await response.aread()
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        cursor.is_finished = True
                        return
                    raise refusal(whole(response))
                is_open = True
                patience.connected()
                parser = EventStreamParser()
                async with aclosing(response.aiter_raw()) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        for event in parser.feed(chunk):
                            if isinstance(event, StreamGap):
                                return
                            yield event
                        if patience.wait_s(LIVE_S) < wait_s - SLACK_S:
                            return
        except httpx.ReadTimeout as error:
            if not is_open:
                raise unreachable(error) from error
        except httpx.HTTPError as error:
            raise unreachable(error) from error
