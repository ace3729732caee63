"""A reader that runs beside the test, through either client."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

from api_stub.client.client import AsyncClient, Client
from tests.servers import eventually

KINDS = ("Client", "AsyncClient")


class Reading:
    """Reads a job in a thread. `items` grows as they come; `join` waits for the end and raises what was raised."""

    def __init__(
        self, kind: str, url: str, job_id: str, what: str = "stream", timeout: float | None = 20.0, after: int = 0
    ) -> None:
        self.items: list[object] = []
        self.error: Exception | None = None
        self._url, self._job_id, self._what, self._timeout, self._after = url, job_id, what, timeout, after
        body = self._read if kind == "Client" else lambda: asyncio.run(self._read_async())
        self._thread = threading.Thread(target=self._guarded, args=(body,), daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = 30.0) -> list[object]:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still reading, so far: {self.items}"
        if self.error is not None:
            raise self.error
        return self.items

    def wait_for(self, num_items: int) -> None:
        eventually(lambda: len(self.items) >= num_items or not self._thread.is_alive(), what=f"{num_items} items")
        assert len(self.items) >= num_items, (self.items, self.error)

    def _guarded(self, body: object) -> None:
        assert callable(body)
        try:
            body()
        except Exception as error:  # noqa: BLE001 - handed to the test by `join`
            self.error = error

    def _read(self) -> None:
        with Client(self._url) as client:
            job = client.job(self._job_id)
            if self._what == "stream":
                for piece in job.stream(self._timeout):
                    self.items.append(piece)
            elif self._what == "events":
                for event in job.events(self._after, self._timeout):
                    self.items.append(event)
            else:
                self.items.append(job.result(self._timeout))

    async def _read_async(self) -> None:
        async with AsyncClient(self._url) as client:
            job = client.job(self._job_id)
            if self._what == "stream":
                async with aclosing(job.stream(self._timeout)) as pieces:
                    async for piece in pieces:
                        self.items.append(piece)
            elif self._what == "events":
                async with aclosing(job.events(self._after, self._timeout)) as events:
                    async for event in events:
                        self.items.append(event)
            else:
                self.items.append(await job.result(self._timeout))
