"""The Celery tasks: take the message, run the pipeline, never let anything past.

On a thread pool an escaping SystemExit or MemoryError leaks the slot for ever: the message is neither acknowledged
nor rejected. So every body ends in Ignore, which acknowledges the message and stores nothing; results are the
ledger's.
"""

from __future__ import annotations

import logging
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import Ignore, Reject

from api_stub.contract import names
from api_stub.contract.job import TaskName
from worker.bootstrap import Runtime
from worker.intake import Knock

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

    def run(self, *args: object, **kwargs: object) -> None:
        """Handle one message. Always raises Ignore, or Reject to put a message back that could not be recorded."""
        knock = self._knock(args, kwargs)
        try:
            self._handle(knock)
        except redis.RedisError as error:
            logger.warning(
                "message not handled",
                extra={"action": "knock", "job_id": knock.job_id, "error": type(error).__name__},
            )
            if knock.fields is not None:  # a plain message is the only copy of its job until it is adopted
                raise Reject(reason="the ledger is away", requeue=True) from error
        except Reject:
            raise
        except BaseException:
            logger.exception("task broke", extra={"action": "knock", "job_id": knock.job_id})
        raise Ignore

    def _handle(self, knock: Knock) -> None:
        if self._runtime.drain.is_draining:
            raise Reject(reason="draining", requeue=True)  # another worker takes it at once
        accepted = self._runtime.intake.accept(knock)
        if accepted is not None:
            self._runtime.pipeline.run(accepted)

    def _knock(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Knock:
        request = self.request
        is_doorbell = bool(
            (request.get("headers") or {}).get(names.DOORBELL_HEADER) or request.get(names.DOORBELL_HEADER)
        )
        priority = (request.delivery_info or {}).get("priority") or 0
        return Knock(
            job_id=str(request.id),
            task=self._task,
            priority=min(9, max(0, int(priority))),
            fields=None if is_doorbell else kwargs,
            num_args=len(args),
        )
