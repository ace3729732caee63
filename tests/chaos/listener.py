"""Counts the results that Redis publishes, per job: never more than one, whatever breaks."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

import redis

from api_stub.contract import names
from tests.servers import RedisServer


class ResultListener:
    """Subscribed to all results while the block lasts; what is published during its own reconnection is missed."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)
        self.published: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except redis.RedisError:
                self._stop.wait(0.1)

    def _listen(self) -> None:
        with self._server.client() as client, client.pubsub(ignore_subscribe_messages=True) as results:
            results.psubscribe(names.result_key("*"))
            while not self._stop.is_set():
                message = results.get_message(timeout=0.5)
                if message is not None:
                    self.published[str(message["channel"]).removeprefix(names.result_key(""))] += 1
