"""Looks what operators want of the workers of a model, and has its own worker fulfil it, one worker at a time.

The first worker that cannot fulfil a wish ends it: what was wanted before is wanted again, of all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import redis
from redis.exceptions import LockError
from redis.lock import Lock

from api_stub.contract import names
from api_stub.contract.wish import Wish
from api_stub.ledger.ledger import Ledger
from worker.errors import WorkerError
from worker.jobs.served import Served
from worker.lifecycle.admission import Busy
from worker.lifecycle.exchange import StartAgain

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
#: A worker that has the turn renews it; when it dies, the turn is the next one's after this time.
TURN_S: Final = 20.0
#: So long the turn stays with a worker that starts again to fulfil a wish.
RESTART_S: Final = 300.0


class Fulfils(Protocol):
    """Changes what a worker serves."""

    def fulfil(self, wish: Wish) -> None: ...


class Rollout:
    """The part of one worker. `start` once it consumes; `stop` once.

    wish: what the process was started to serve. start_again: ends this process so that it begins anew. tell: tells
    Redis what is served now.
    """

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        served: Served,
        wish: Wish,
        exchange: Fulfils,
        start_again: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        self._ledger, self._worker, self._served = ledger, worker, served
        self._exchange, self._start_again, self._tell = exchange, start_again, tell
        self._stopping = threading.Event()
        self._starts_again = False
        self._wish = wish.fulfilled(served.now.checkpoint)
        self._failed = -1  # number of the last wish that could not be fulfilled
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A change in progress is cut off with the process: the next one starts with what is wanted."""
        self._stopping.set()

    def look(self) -> None:
        """Fulfil what is wanted now, if it is another wish and nobody else's turn. Raises redis.RedisError."""
        number = self._ledger.wish(self._served.model).number
        if number in (self._served.now.number, self._failed):
            return
        if not number:  # Redis came back empty: what is served was wanted
            self._remember()
            return
        with self._turn() as lock:
            if lock is None:
                return
            wish = self._ledger.wish(self._served.model)  # what was read before the turn may be over
            if wish.number != self._served.now.number and not self._stopping.is_set():
                self._fulfil(wish)

    def _remember(self) -> None:
        served = self._wish
        self._ledger.change_wish(self._served.model, lambda found: found if found.number else served)
        logger.warning("the wish was lost and is written again", extra={"action": "rollout", "number": served.number})

    def _fulfil(self, wish: Wish) -> None:
        facts = {"action": "rollout", "number": wish.number, "source": wish.weights.source}
        logger.info("something else is wanted", extra=facts | {"adapters": dict(wish.adapters)})
        try:
            self._exchange.fulfil(wish)
        except Busy as error:
            logger.warning("the change is put off", extra=facts | {"reason": str(error)})
        except StartAgain as reason:
            logger.info("the worker starts again for this", extra=facts | {"reason": str(reason)})
            self._starts_again = True
            self._stopping.set()
        except redis.RedisError:
            raise
        except Exception as error:
            if self._stopping.is_set():
                return  # the engine ended with the process: the next one starts with what is wanted
            is_known = isinstance(error, WorkerError)
            problem = str(error) if is_known else type(error).__name__
            logger.error("what is wanted cannot be served", extra=facts | {"error": problem}, exc_info=not is_known)
            fail_wish(self._ledger, self._served.model, wish, problem)
            self._failed = wish.number
        else:
            self._wish = wish.fulfilled(self._served.now.checkpoint)
            fulfil_wish(self._ledger, self._served.model, wish, self._served.now.checkpoint)
            self._tell()

    @contextmanager
    def _turn(self) -> Iterator[Lock | None]:
        """Hold the turn in the block; None: another worker has it. A worker that starts again leaves it behind."""
        key = names.turn_of_change_key(self._served.model)
        lock = self._ledger.client.lock(key, timeout=TURN_S, thread_local=False, raise_on_release_error=False)
        if not lock.acquire(blocking=False, token=self._worker):
            yield None
            return
        done = threading.Event()
        renewing = threading.Thread(target=_renew, args=(lock, done), name="turn", daemon=True)
        renewing.start()
        try:
            yield lock
        finally:
            done.set()
            renewing.join()
            if self._starts_again:
                try:
                    lock.extend(RESTART_S, replace_ttl=True)  # the process that comes has the same name
                except (redis.RedisError, LockError) as error:
                    facts = {"action": "rollout", "error": type(error).__name__}
                    logger.warning("the turn could not be kept for the restart", extra=facts)
                self._start_again()
            else:
                lock.release()

    def _run(self) -> None:
        self._take_over()
        while not self._stopping.wait(LOOK_S):
            try:
                self.look()
            except (redis.RedisError, LockError) as error:
                logger.info("nothing is known of wishes", extra={"action": "rollout", "error": type(error).__name__})
            except Exception:
                logger.exception("rollout failed", extra={"action": "rollout"})

    def _take_over(self) -> None:
        """Give back the turn that the process before this one left behind for it."""
        key = names.turn_of_change_key(self._served.model)
        try:
            if self._ledger.client.get(key) == self._worker:
                self._ledger.client.delete(key)
        except redis.RedisError:
            logger.info("turn not given back", extra={"action": "rollout"})  # it ends by itself


def fail_wish(ledger: Ledger, model: str, wish: Wish, problem: str) -> None:
    """Have what was wanted before wanted again, unless the wish has changed meanwhile. Raises redis.RedisError."""

    def back(now: Wish) -> Wish:
        return now.failed(problem) if now.number == wish.number and now.before is not None else now

    ledger.change_wish(model, back)


def fulfil_wish(ledger: Ledger, model: str, wish: Wish, digest: str) -> None:
    """Note that a worker fulfils a wish. Raises redis.RedisError."""
    ledger.change_wish(model, lambda now: now.fulfilled(digest) if now.number == wish.number else now)


def _renew(lock: Lock, done: threading.Event) -> None:
    while not done.wait(TURN_S / 4):
        try:
            lock.reacquire()
        except (redis.RedisError, LockError) as error:
            logger.info("turn not renewed", extra={"action": "rollout", "error": type(error).__name__})
