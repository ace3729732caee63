"""A gateway as its users meet it: uvicorn on a free port, in a thread of this process or in one of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from api_stub.gateway.app import server_of
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import KeyRing
from api_stub.settings import GatewaySettings
from tests.servers import eventually, free_port

WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Service:
    """A running gateway and a client of it."""

    url: str
    http: httpx.Client
    gateway: Gateway

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return "127.0.0.1", self.gateway.settings.api_port


@contextmanager
def serving(redis_url: str, s3_url: str = "http://127.0.0.1:1", **options: object) -> Iterator[Service]:
    """Run a gateway in a thread. `options` are fields of GatewaySettings."""
    settings = GatewaySettings.model_validate(
        {
            "redis_url": redis_url,
            "s3_endpoint_url": s3_url,
            "api_port": free_port(),
            "sweep_s": 60.0,
            "api_models": "default,other",
        }
        | options
    )
    server = server_of(settings, KeyRing.load(settings))
    thread = threading.Thread(target=server.run, name="gateway")
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), WAIT_S, "the gateway listens")
        url = f"http://127.0.0.1:{settings.api_port}"
        with httpx.Client(base_url=url, timeout=WAIT_S) as http:
            yield Service(url, http, server.gateway)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


@dataclass(frozen=True, slots=True)
class Sent:
    """One event as a stream sent it; `id` is empty for events without one."""

    id: str
    type: str
    data: dict[str, object]


def sent_events(lines: Iterator[str]) -> Iterator[Sent]:
    """Read a text/event-stream; comments and `retry:` are passed over."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield Sent(fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"]))
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def text_of(events: list[Sent]) -> str:
    """The text of the last attempt's deltas."""
    text = ""
    for event in events:
        if event.type == "job.started":
            text = ""
        elif event.type == "output.delta":
            assert event.data["offset"] == len(text)
            text += str(event.data["text"])
    return text
