"""The Celery tasks: take any message, run the pipeline, never let anything past.

Two doors can break a worker on a thread pool. On the way in, Celery reads headers and body on its event loop, where a
message that is not well made ends the process, and comes back to the next one. So worker.broker.transport hands it
messages of its own making, and what the producer wrote is decoded here, on the job's thread. On the way out, an
escaping SystemExit or MemoryError leaks the slot for ever. So every run ends in Ignore, which acknowledges the message
and stores nothing; results are the ledger's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import Ignore, Reject

from api_stub.contract.job import TaskName
from worker.jobs.entry import Entry, Unreadable
from worker.jobs.message import read_message
from worker.lifecycle.process import WorkerProcess

logger = logging.getLogger(__name__)


def register(app: Celery, process: WorkerProcess, on_linked: Callable[[], None]) -> None:
    """Give the app the three tasks of the contract, served by `process`.

    `on_linked` is called after a message that wants something sent when its job is over.
    """
    for name in TaskName:
        app.register_task(_JobTask(name, process, on_linked))


class _JobTask(Task[Any, Any]):
    """One task name of the contract. Its result is always empty: answers live in the ledger."""

    ignore_result = True
    acks_late = True

    def __init__(self, task: TaskName, process: WorkerProcess, on_linked: Callable[[], None]) -> None:
        self.name = task.value
        self._task = task
        self._process = process
        self._on_linked = on_linked

    def run(self, entry: str) -> None:
        """Handle one message. Always raises Ignore, or Reject to put a message back that could not be recorded."""
        said = Entry.from_json(entry)
        facts = {"action": "knock", "job_id": said.job_id}
        try:
            with self._process.consumption.taken():
                self._handle(said)
        except Unreadable as error:
            logger.error("message dropped", extra=facts | {"reason": error.reason.value})
            self._process.metrics.count_dropped(error.reason)
        except redis.RedisError as error:
            logger.warning("message not handled", extra=facts | {"error": type(error).__name__})
            if not said.is_doorbell:  # a plain message is the only copy of its job until it is adopted
                raise Reject(reason="the ledger is away", requeue=True) from error
        except Reject:
            raise
        except BaseException:
            logger.exception("task broke", extra=facts)
        raise Ignore

    def _handle(self, entry: Entry) -> None:
        if self._process.drain.is_draining:
            logger.info("message put back", extra={"action": "drain", "job_id": entry.job_id})
            self._put_back(entry)
            return
        name = entry.job_id or ""
        if not self._process.circuit.begin(name):
            logger.info("message put back", extra={"action": "circuit", "job_id": entry.job_id})
            self._put_back(entry)
            return
        try:
            message = read_message(entry)
            claimed = self._process.claimer.claim(message)
            if claimed is not None:
                self._process.pipeline.run(claimed)
            if message.links is not None:
                self._on_linked()
        finally:
            self._process.circuit.end(name)

    def _put_back(self, entry: Entry) -> None:
        """Leave a message to another worker, which takes it at once."""
        if not entry.is_doorbell or entry.job_id is None:
            raise Reject(reason="not taken here", requeue=True)
        self._process.claimer.decline([entry.job_id])
