"""Subscriptions that are used again: a reader of a job that has ended leaves its connection to the next reader.

Opening a connection and closing it would cost a short job more than its events do.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import redis
from redis.client import PubSub

#: How long Redis may take to confirm a subscription.
CONFIRM_S: Final = 2.0
#: Connections that wait for their next reader, and for how long one may have waited that is still trusted.
MAX_IDLE: Final = 8
MAX_IDLE_S: Final = 10.0


class Subscription:
    """One channel at a time on one connection. Belongs to one thread at a time.

    Its reader sets `is_over` when nothing more will come: the channel is left when the next one is subscribed.
    """

    def __init__(self, subscription: PubSub) -> None:
        self._subscription = subscription
        self._channel: str | None = None
        self._used_at = time.monotonic()
        self.is_over = False

    def begin(self, channel: str) -> dict[str, Any]:
        """Subscribe; return the confirmation. Raises what redis-py raises."""
        if self._channel is not None:
            self._subscription.unsubscribe(self._channel)  # type: ignore[no-untyped-call]
        self._channel, self.is_over = channel, False
        self._subscription.subscribe(channel)
        message = self.next(CONFIRM_S)
        while message is not None and message["type"] != "subscribe":
            message = self.next(CONFIRM_S)  # the last reader's channel has a word left
        if message is None:
            raise redis.TimeoutError("Redis did not confirm a subscription")
        return message

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message of the channel, or `subscribe` when it was subscribed anew; None after a silence."""
        self._used_at = time.monotonic()
        message: dict[str, Any] | None = self._subscription.get_message(timeout=timeout_s)
        while message is not None and (message["channel"] != self._channel or message["type"] == "unsubscribe"):
            message = self._subscription.get_message(timeout=timeout_s)
        return message

    @property
    def idle_s(self) -> float:
        """Seconds since it was last asked for a message."""
        return time.monotonic() - self._used_at

    def close(self) -> None:
        """Close the connection."""
        self._subscription.close()


class Subscriptions:
    """Lends subscriptions. Safe to share between threads."""

    def __init__(self, readers: redis.Redis) -> None:
        self._readers = readers
        self._lock = threading.Lock()
        self._idle: list[Subscription] = []
        self._owner = os.getpid()

    @contextmanager
    def lend(self) -> Generator[Subscription, None, None]:
        """Lend one. It is kept for the next reader when its channel has fallen silent for good, else closed."""
        subscription = self._take() or Subscription(self._readers.pubsub())  # type: ignore[no-untyped-call]
        try:
            yield subscription
        finally:
            if not (subscription.is_over and self._kept(subscription)):
                subscription.close()

    def _kept(self, subscription: Subscription) -> bool:
        with self._lock:
            is_kept = self._owner == os.getpid() and len(self._idle) < MAX_IDLE
            if is_kept:
                self._idle.append(subscription)
        return is_kept

    def _take(self) -> Subscription | None:
        """Return the one that was used last, if it is still trusted; a child process shares none with its parent."""
        with self._lock:
            if self._owner != os.getpid():
                self._idle, self._owner = [], os.getpid()
            taken = self._idle.pop() if self._idle else None
        if taken is not None and taken.idle_s > MAX_IDLE_S:
            taken.close()
            return None
        return taken
