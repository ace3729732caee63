"""Looks what operators want of the workers of a model, and has its own worker fulfil it, one worker at a time.

The first worker that cannot fulfil a wish ends it: what was wanted before is wanted again, of all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

import redis

from api_stub.contract.wish import Wish
from api_stub.ledger.ledger import Ledger
from worker.errors import WorkerError
from worker.jobs.served import Served
from worker.lifecycle.admission import Busy
from worker.lifecycle.exchange import StartAgain
from worker.lifecycle.turn import Turn

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
#: Pause before a worker tries again what it could not do, and nobody has given up: its jobs did not end, or there is
#: nothing that was wanted before.
PAUSE_S: Final = 60.0


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
        turn: Turn,
        served: Served,
        wish: Wish,
        exchange: Fulfils,
        start_again: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        self._ledger, self._turn, self._served = ledger, turn, served
        self._exchange, self._start_again, self._tell = exchange, start_again, tell
        self._wish = wish  # what is served
        self._is_noted = wish.is_fulfilled or not wish.number
        self._stopping = threading.Event()
        self._not_before = 0.0  # monotonic
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A change in progress is cut off with the process: the next one starts with what is wanted."""
        self._stopping.set()

    def give_up(self, problem: str) -> bool:
        """Have what was wanted before wanted again, because the process cannot start with this; whether that is so.

        Only while the wish is being fulfilled: what others serve already is not given up for a fault of one machine.
        Raises redis.RedisError.
        """
        return give_up(self._ledger, self._turn, self._served.model, self._wish, problem)

    def look(self) -> None:
        """Fulfil what is wanted now, if it is another wish and nobody else's turn. Raises redis.RedisError."""
        if not self._is_noted:
            self._note()
        self._turn.give_back()  # of the process before this one
        number = self._ledger.wish(self._served.model).number
        if number == self._served.now.number or time.monotonic() < self._not_before:
            return
        if not number:  # Redis came back empty: what is served was wanted
            self._remember()
        elif self._turn.take():
            try:
                wish = self._ledger.wish(self._served.model)  # what was read before the turn may be over
                starts_again = wish.number != self._served.now.number and self._fulfil(wish)
            except BaseException:
                self._turn.give_back()
                raise
            if starts_again:
                self._stopping.set()
                self._turn.leave_behind()
                self._start_again()
            else:
                self._turn.give_back()

    def _remember(self) -> None:
        served = self._wish.fulfilled(self._served.now.checkpoint)
        self._ledger.change_wish(self._served.model, lambda found: found if found.number else served)
        logger.warning("the wish was lost and is written again", extra={"action": "rollout", "number": served.number})

    def _note(self) -> None:
        """Note that a worker fulfils the wish."""
        number, digest = self._wish.number, self._served.now.checkpoint
        self._ledger.change_wish(self._served.model, lambda now: now.fulfilled(digest) if now.number == number else now)
        self._is_noted = True

    def _fulfil(self, wish: Wish) -> bool:
        """Fulfil a wish or give it up; return whether the process must begin anew for it."""
        facts = {"action": "rollout", "number": wish.number, "source": wish.weights.source}
        logger.info("something else is wanted", extra=facts | {"adapters": dict(wish.adapters)})
        try:
            self._exchange.fulfil(wish)
        except Busy as error:
            self._not_before = time.monotonic() + PAUSE_S
            logger.warning("the change is put off", extra=facts | {"reason": str(error)})
        except StartAgain as reason:
            logger.info("the worker starts again for this", extra=facts | {"reason": str(reason)})
            return True
        except redis.RedisError:
            raise
        except Exception as error:
            if self._stopping.is_set():
                return False  # the engine ended with the process: the next one starts with what is wanted
            is_known = isinstance(error, WorkerError)
            problem = str(error) if is_known else type(error).__name__
            logger.error("what is wanted cannot be served", extra=facts | {"error": problem}, exc_info=not is_known)
            self._not_before = time.monotonic() + (0.0 if wish.before is not None else PAUSE_S)
            fail_wish(self._ledger, self._served.model, wish, problem)
        else:
            self._wish, self._is_noted = wish, False
            self._note()
            self._tell()
        return False

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except redis.RedisError as error:
                logger.info("nothing is known of wishes", extra={"action": "rollout", "error": type(error).__name__})
            except Exception:
                logger.exception("rollout failed", extra={"action": "rollout"})
            self._stopping.wait(LOOK_S)


def give_up(ledger: Ledger, turn: Turn, model: str, wish: Wish, problem: str) -> bool:
    """Do what `Rollout.give_up` does, for a process that has got no further than reading the wish."""
    if wish.before is None or (wish.is_fulfilled and not turn.is_held):
        return False
    logger.error("what is wanted cannot be served", extra={"action": "rollout", "error": problem})
    fail_wish(ledger, model, wish, problem)
    turn.leave_behind()
    return True


def fail_wish(ledger: Ledger, model: str, wish: Wish, problem: str) -> None:
    """Have what was wanted before wanted again, unless the wish has changed meanwhile. Raises redis.RedisError."""

    def back(now: Wish) -> Wish:
        return now.failed(problem) if now.number == wish.number and now.before is not None else now

    ledger.change_wish(model, back)
