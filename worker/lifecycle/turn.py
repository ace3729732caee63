"""Whose turn it is among the workers of a model to change what it serves: one at a time.

The turn lies in Redis under the worker's name. It is renewed while it is held, so that it is free soon after its holder
died; a worker that begins anew leaves it behind for the process that follows, which has the same name.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

import redis
from redis.exceptions import LockError

from api_stub.contract import names

logger = logging.getLogger(__name__)

#: How long the turn lasts without being renewed.
TURN_S: Final = 20.0
#: How long it waits for the process that follows: until that renews it, jobs have to end and libraries are imported.
RESTART_S: Final = 300.0


class Turn:
    """The turn of one worker. One thread, beside one that renews it."""

    def __init__(self, client: redis.Redis, model: str, worker: str) -> None:
        self._client, self._worker = client, worker
        self._key = names.turn_of_change_key(model)
        self._lock = client.lock(self._key, timeout=TURN_S, thread_local=False, raise_on_release_error=False)
        self._done = threading.Event()
        self._renewing: threading.Thread | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process holds it, as far as it knows."""
        return self._renewing is not None

    def take(self) -> bool:
        """Take the turn unless another worker has it. Raises redis.RedisError."""
        if not self._lock.acquire(blocking=False, token=self._worker):
            return False
        self._renew()
        return True

    def resume(self) -> None:
        """Hold on to the turn that the process before this one left behind, if it did. Does not raise."""
        try:
            if self._client.get(self._key) == self._worker:
                self._lock.local.token = self._worker.encode()
                self._renew()
        except redis.RedisError as error:
            logger.info("turn not resumed", extra=_facts(error))

    def give_back(self) -> None:
        """Let the next worker have it. Does not raise: a turn that cannot be given back ends by itself."""
        if not self.is_held:
            return
        self._stop_renewing()
        try:
            self._lock.release()
        except (redis.RedisError, LockError) as error:
            logger.info("turn not given back", extra=_facts(error))

    def leave_behind(self) -> None:
        """Keep it for the process that follows. Does not raise."""
        if not self.is_held:
            return
        self._stop_renewing()
        try:
            self._lock.extend(RESTART_S, replace_ttl=True)
        except (redis.RedisError, LockError) as error:
            logger.warning("turn not kept for the process that follows", extra=_facts(error))

    def _renew(self) -> None:
        self._done.clear()
        self._renewing = threading.Thread(target=self._run, name="turn", daemon=True)
        self._renewing.start()

    def _stop_renewing(self) -> None:
        assert self._renewing is not None
        self._done.set()
        self._renewing.join()
        self._renewing = None

    def _run(self) -> None:
        while not self._done.wait(TURN_S / 4):
            try:
                self._lock.reacquire()
            except (redis.RedisError, LockError) as error:
                logger.info("turn not renewed", extra=_facts(error))


def _facts(error: Exception) -> dict[str, object]:
    return {"action": "turn", "error": type(error).__name__}
