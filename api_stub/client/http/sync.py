"""The transport through a gateway for threads."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
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
    send,
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


class HttpTransport:
    """Reaches jobs through a gateway. Connections are opened on first use."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._http = httpx.Client(base_url=url, headers=headers(api_key), limits=LIMITS)

    def submit(self, job_id: str, job: Job) -> None:
        """Hand a job in. The same id and body again is the same job."""
        send(self._http, requests.submit(job_id, job))

    def retry(self, job_id: str) -> str:
        """Queue a new job with the body of a finished one; return its id."""
        return send(self._http, requests.retry(job_id)).job_id

    def view(self, job_id: str) -> JobView:
        """Look at a job."""
        return send(self._http, requests.view(job_id))

    def cancel(self, job_id: str) -> Cancelled:
        """Ask for a job's end; never answers UNKNOWN."""
        is_final = self.view(job_id).status.is_final
        return Cancelled.FINAL if is_final else send(self._http, requests.cancel(job_id))

    def cancel_jobs(self, tenant: str, wanted: JobSelection) -> CancelledJobs:
        """Ask for the end of all jobs of a tenant that are wanted."""
        return send(self._http, requests.cancel_jobs(tenant, wanted))

    def delete(self, job_id: str) -> None:
        """Remove a final job, its events and its result."""
        send(self._http, requests.delete(job_id))

    def pause(self, model: str) -> QueueChange:
        """Let nobody claim a model's jobs."""
        return send(self._http, requests.pause(model))

    def resume(self, model: str) -> QueueChange:
        """Let a model's jobs be claimed again."""
        return send(self._http, requests.resume(model))

    def purge(self, model: str) -> int:
        """End all queued jobs of a model; return how many."""
        return send(self._http, requests.purge(model))

    def events(self, job_id: str, after: int, timeout: float | None) -> Generator[Event, None, None]:
        """Yield a job's events above seq `after`, the final one last; `timeout` bounds silence.

        Comes back with the last seq whenever the stream breaks.
        """
        cursor, timeouts = EventCursor(after), ReadTimeouts(timeout)
        while not cursor.is_finished:
            try:
                with closing(self._arriving(job_id, cursor, timeouts)) as arriving:
                    for arrived in arriving:
                        for event in cursor.take(arrived):
                            yield event
                            timeouts.heard()
                        if cursor.is_finished:
                            return
            except (StoreUnavailable, QueueFull) as error:
                time.sleep(timeouts.pause_s(error))

    def result(self, job_id: str, timeout: float | None) -> Result:
        """Wait at most `timeout` seconds for a job's answer."""
        timeouts, wait_s, longest_s = ReadTimeouts(timeout), 0.0, requests.WAIT_S
        while True:
            try:
                view = send(self._http, requests.ending(job_id, wait_s))
                if view.status.is_final:
                    return answered(view.result, view.error)
                timeouts.connected()
            except (StoreUnavailable, QueueFull) as error:
                longest_s = requests.shorter_s(longest_s, error)
                time.sleep(timeouts.pause_s(error))
            wait_s = timeouts.wait_s(longest_s)

    def dead(self, limit: int) -> tuple[JobView, ...]:
        """Not offered by gateways. Raises InvalidRequest."""
        requests.redis_only("dead")

    def drop(self, job_id: str) -> bool:
        """Not offered by gateways. Raises InvalidRequest."""
        requests.redis_only("drop")

    def upload(self, path: str | Path) -> str:
        """Store a local file and return its URI."""
        return upload(self._http, path)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _arriving(self, job_id: str, cursor: EventCursor, timeouts: ReadTimeouts) -> Generator[Event, None, None]:
        """Yield the events of one response; end when it ends, is silent for long, or left something out."""
        wait_s = timeouts.wait_s(LIVE_S)
        timeout = httpx.Timeout(requests.ANSWER_S, connect=requests.CONNECT_S, read=wait_s)
        is_open = False
        try:
            with self._http.stream("GET", stream_path(job_id, cursor.last_seq), timeout=timeout) as response:
                if response.status_code != HTTPStatus.OK:
                    response.read()
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        cursor.is_finished = True
                        return
                    raise error_of(whole(response))
                is_open = True
                timeouts.connected()
                parser = EventStreamParser()
                for chunk in response.iter_raw():
                    for event in parser.feed(chunk):
                        if isinstance(event, StreamGap):
                            return
                        yield event
                    if timeouts.wait_s(LIVE_S) < wait_s - SLACK_S:
                        return  # the silence is over before this response would say so
        except httpx.ReadTimeout as error:
            if not is_open:
                raise unreachable(error) from error
        except httpx.HTTPError as error:
            raise unreachable(error) from error
