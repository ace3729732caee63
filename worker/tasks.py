"""The Celery tasks: take any message, run the pipeline, never let anything past.

Two doors can break a worker on a thread pool. On the way in, Celery reads headers and body on its event loop, where a
message that is not well made ends the process, and comes back to the next one. So every message is first rewritten
into one that carries nothing but what it says (`Knock`). On the way out, an escaping SystemExit or MemoryError leaks
the slot for ever. So every run ends in Ignore, which acknowledges the message and stores nothing; results are the
ledger's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import Ignore, Reject

from api_stub.contract.job import TaskName
from worker.knock import Knock, read_knock
from worker.runtime import Runtime

logger = logging.getLogger(__name__)


def register(app: Celery, runtime: Runtime) -> None:
    """Give the app the three tasks of the contract, served by `runtime`."""
    for name in TaskName:
        app.register_task(_JobTask(name, runtime))


class _JobTask(Task[Any, Any]):
    """One task name of the contract. Its result is always empty: answers live in the ledger."""

    ignore_result = True
    acks_late = True

    def __init__(self, task: TaskName, runtime: Runtime) -> None:
        self.name = task.value
        self._task = task
        self._runtime = runtime

    def start_strategy(self, app: Any, consumer: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return what Celery calls for every message of this task, on its event loop."""
        handle = super().start_strategy(app, consumer, **kwargs)

        def on_message(message: Any, body: object, ack: Any, reject: Any, callbacks: Any) -> object:
            knock = read_knock(self._task, message.headers or {}, message.properties or {}, _decoded(message, body))
            if knock is None:
                logger.error("message without a usable id dropped", extra={"action": "knock", "task": self._task.value})
                return reject(logger, consumer.connection_errors)
            _rewrite(message, knock)
            return handle(message, None, ack, reject, callbacks)

        return on_message

    def run(self, knock: str) -> None:
        """Handle one message. Always raises Ignore, or Reject to put a message back that could not be recorded."""
        said = Knock.from_json(knock)
        try:
            with self._runtime.consumption.taken():
                self._handle(said)
        except redis.RedisError as error:
            logger.warning(
                "message not handled",
                extra={"action": "knock", "job_id": said.job_id, "error": type(error).__name__},
            )
            if said.fields is not None:  # a plain message is the only copy of its job until it is adopted
                raise Reject(reason="the ledger is away", requeue=True) from error
        except Reject:
            raise
        except BaseException:
            logger.exception("task broke", extra={"action": "knock", "job_id": said.job_id})
        raise Ignore

    def _handle(self, knock: Knock) -> None:
        if self._runtime.drain.is_draining:
            logger.info("message put back", extra={"action": "drain", "job_id": knock.job_id})
            raise Reject(reason="draining", requeue=True)  # another worker takes it at once
        accepted = self._runtime.intake.accept(knock)
        if accepted is not None:
            self._runtime.pipeline.run(accepted)


def _decoded(message: Any, body: object) -> object:
    """Return the decoded body, or the exception that decoding it raises (foreign content type, broken JSON, …)."""
    if body is not None:
        return body
    try:
        return message.payload
    except Exception as error:  # noqa: BLE001 - kombu's decoders raise whatever their formats raise
        return error


def _rewrite(message: Any, knock: Knock) -> None:
    """Make it a message of protocol 2 without eta, expiry, time limit or callbacks: none of them works on this pool.

    What a requeue puts back is the broker's own copy, which stays as the producer made it.
    """
    payload = [[], {"knock": knock.to_json()}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    message.body = json.dumps(payload)
    message._decoded_cache = payload
    message.content_type, message.content_encoding = "application/json", "utf-8"
    headers: dict[str, object] = {
        "lang": "py", "task": knock.task.value, "id": knock.job_id, "root_id": knock.job_id, "parent_id": None,
        "group": None, "retries": 0, "timelimit": [None, None], "eta": None, "expires": None, "ignore_result": True,
        "argsrepr": "()", "kwargsrepr": "{}", "origin": None,
    }  # fmt: skip
    message.headers = headers
