"""One of the demo's jobs takes the other way in: handed in and followed over HTTP, with the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import urlsplit

from api_stub.contract.event import Event, FinalEvent, parse_event
from api_stub.errors import VisionqError

SUBMIT_S = 30.0


class GatewayFailed(VisionqError):
    """Raised when the gateway refused the demo's job or did not carry it to its end."""

    code = "gateway_failed"


@dataclass(frozen=True, slots=True)
class HttpJob:
    """A job that the gateway took. `events` is what `JobHandle.events` is."""

    url: str
    id: str

    @classmethod
    def submit(cls, url: str, fields: Mapping[str, object]) -> HttpJob:
        """Hand a job in to the gateway at `url`. Raises GatewayFailed."""
        body = json.dumps(fields)
        try:
            with closing(_connection(url, SUBMIT_S)) as connection:
                connection.request("POST", "/v1/jobs", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                reply = json.loads(answer.read())
        except (OSError, HTTPException, ValueError) as error:
            raise GatewayFailed(f"the gateway at {url} took no job: {type(error).__name__}") from error
        if "job_id" not in reply:
            raise GatewayFailed(f"the gateway refused the job: {reply.get('detail', answer.status)}")
        return cls(url, str(reply["job_id"]))

    def events(self, after: int = 0, timeout: float | None = None) -> Generator[Event, None, None]:
        """Yield the job's events. Raises GatewayFailed, TimeoutError when not even a heartbeat comes in time."""
        try:
            with closing(_connection(self.url, timeout)) as connection:
                connection.request("GET", f"/v1/jobs/{self.id}/events?after={after}")
                yield from _events(connection.getresponse())
        except TimeoutError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise GatewayFailed(f"the stream of job {self.id} broke: {type(error).__name__}") from error


def _events(answer: HTTPResponse) -> Generator[Event, None, None]:
    for line in answer:
        if line.startswith(b"data: "):
            event = parse_event(line.removeprefix(b"data: "))
            yield event
            if isinstance(event, FinalEvent):
                return
    raise GatewayFailed(f"the gateway ended a stream before its job, status {answer.status}")


def _connection(url: str, timeout_s: float | None) -> HTTPConnection:
    address = urlsplit(url)
    return HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
