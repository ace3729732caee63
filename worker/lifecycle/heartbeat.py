"""Renews the leases of all attempts: one thread, one ledger call per beat.

Between beats it listens on the cancel channel, so that a cancelled job stops at once and not at the next beat. An
attempt whose lease was not confirmed for most of its length is stopped: soon another worker may own the job. When Redis
is back, the ledger takes such a job back into the queue, or refuses because another worker claimed it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import redis

from api_stub.contract import names
from api_stub.ledger import writable
from api_stub.ledger.ledger import Ledger
from api_stub.ledger.rows import Hold
from api_stub.ledger.verdicts import code_of
from worker.jobs.attempt import Attempt, Attempts, StopReason

logger = logging.getLogger(__name__)

#: Share of the lease after which an unconfirmed attempt stops; the rest is margin for the stop itself.
SELF_FENCE: Final = 0.9


class Heartbeat:
    """The heartbeat of one worker. `client` is the ledger's; it is used for the cancel channel and the write probe.

    serves: returns the JSON of what the worker serves, which every beat tells; empty where there is nothing.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: redis.Redis,
        attempts: Attempts,
        *,
        worker: str,
        model: str,
        beat_s: float,
        lease_s: float,
        serves: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger, self._client, self._attempts = ledger, client, attempts
        self._worker, self._model = worker, model
        self._beat_s, self._lease_s, self._clock = beat_s, lease_s, clock
        self._serves = serves
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.last_beat_at = clock()
        #: Why Redis refuses writes; None when it accepts them or does not answer (for that there is `last_beat_at`).
        self.refusal: str | None = None

    def start(self) -> None:
        """Register the worker and start beating."""
        self.beat()
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread and unregister the worker."""
        self._stopping.set()
        self._thread.join(timeout_s)
        try:
            self._ledger.leave(self._worker, self._model)
        except redis.RedisError:
            logger.info("worker not removed from the registry", extra={"action": "leave"})

    def beat(self) -> None:
        """Renew all leases once, and stop the attempts that were cancelled or lost theirs. Redis errors are logged."""
        attempts = self._attempts.held()
        sent_at = self._clock()
        try:
            answers = self._ledger.beat(
                self._worker,
                self._model,
                [(attempt.claim.job_id, attempt.claim.fence) for attempt in attempts],
                self._serves(),
            )
        except redis.RedisError as error:
            self._note(error)
            logger.warning("heartbeat not written", extra={"action": "beat", "error": type(error).__name__})
        else:
            self.last_beat_at = sent_at
            for attempt, answer in zip(attempts, answers, strict=True):
                self._apply(attempt, answer, sent_at)
            self._probe()  # a full Redis accepts beats but no jobs
        self._fence_unconfirmed()

    def _probe(self) -> None:
        try:
            writable.probe(self._client)
        except redis.RedisError as error:
            self._note(error)
        else:
            self.refusal = None

    def _note(self, error: redis.RedisError) -> None:
        self.refusal = None if code_of(error) is None else writable.reason(error)

    def _apply(self, attempt: Attempt, answer: Hold, sent_at: float) -> None:
        if answer is Hold.LOST:
            attempt.stop(StopReason.LOST)
            return
        attempt.held_at = sent_at
        if answer is Hold.CANCEL:
            attempt.stop(StopReason.CANCELLED)

    def _fence_unconfirmed(self) -> None:
        for attempt in self._attempts.held():
            if self._clock() - attempt.held_at > self._lease_s * SELF_FENCE:
                logger.warning("lease not confirmed", extra={"action": "self_fence", "job_id": attempt.claim.job_id})
                attempt.stop(StopReason.UNCONFIRMED)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen_and_beat()
            except redis.RedisError as error:
                logger.warning(
                    "subscription to cancellations lost", extra={"action": "listen", "error": type(error).__name__}
                )
                self.beat()
                self._stopping.wait(min(1.0, self._beat_s))
            except Exception:
                logger.exception("heartbeat thread failed", extra={"action": "beat"})
                self._stopping.wait(min(1.0, self._beat_s))

    def _listen_and_beat(self) -> None:
        """Beat every `beat_s`, listen for cancels in between. Returns when stopping; raises redis.RedisError."""
        with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(names.CANCEL_CHANNEL)
            while not self._stopping.is_set():
                self.beat()
                next_at = self._clock() + self._beat_s
                while not self._stopping.is_set() and (left_s := next_at - self._clock()) > 0:
                    # Short waits keep stop() prompt.
                    message = pubsub.get_message(timeout=min(left_s, 0.5))
                    if message is not None:
                        self._cancel(message["data"])

    def _cancel(self, data: object) -> None:
        job_id = data.decode() if isinstance(data, bytes) else str(data)
        for attempt in self._attempts.held():
            if attempt.claim.job_id == job_id:
                attempt.stop(StopReason.CANCELLED)
