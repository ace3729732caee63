"""The Celery tasks: each takes one message, claims its job and runs the pipeline. No exception of a job escapes.

Celery decodes headers and body on its event loop, where a malformed message ends the process, is redelivered and ends
the next one. So worker.broker.transport hands Celery messages that it builds itself, and the producer's own message is
decoded here, on the job's thread. A SystemExit or MemoryError that escapes from a task would occupy the pool's thread
for ever. So every run ends in Ignore, which acknowledges the message and stores no result; the ledger stores results.
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
from worker.lifecycle.job_process import JobProcess

logger = logging.getLogger(__name__)


def register(app: Celery, process: JobProcess, on_linked: Callable[[], None]) -> None:
    """Give the app the tasks of the contract, served by `process`.

    `on_linked` is called after a message with links, whose job may be over.
    """
    for name in TaskName:
        app.register_task(_JobTask(name, process, on_linked))


class _JobTask(Task[Any, Any]):
    """One task name of the contract. Its result is always empty: answers live in the ledger."""

    ignore_result = True
    acks_late = True

    def __init__(self, task: TaskName, process: JobProcess, on_linked: Callable[[], None]) -> None:
        self.name = task.value
        self._task = task
        self._process = process
        self._on_linked = on_linked

    def run(self, entry: str) -> None:
        """Handle one message. Always raises: Ignore, or Reject to put back a message that could not be handled now."""
        received = Entry.from_json(entry)
        facts = {"action": "knock", "job_id": received.job_id}
        try:
            with self._process.consumption.occupied():
                self._handle(received)
        except Unreadable as error:
            logger.error("message dropped", extra=facts | {"reason": error.reason.value})
            self._process.metrics.count_dropped(error.reason)
        except redis.RedisError as error:
            logger.warning("message not handled", extra=facts | {"error": type(error).__name__})
            if not received.is_doorbell:  # until it is adopted, a plain message is the only copy of its job
                raise Reject(reason="the ledger is away", requeue=True) from error
        except Reject:
            raise
        except BaseException:
            logger.exception("task failed", extra=facts)
        raise Ignore

    def _handle(self, entry: Entry) -> None:
        if self._process.drain.is_draining:
            logger.info("message put back", extra={"action": "drain", "job_id": entry.job_id})
            self._put_back(entry)
            return
        if not self._process.admission.enter():
            logger.info("message put back", extra={"action": "exchange", "job_id": entry.job_id})
            self._put_back(entry)
            return
        try:
            self._handle_inside(entry)
        finally:
            self._process.admission.leave()

    def _handle_inside(self, entry: Entry) -> None:
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
        """Leave a message to another worker: ring again for a doorbell's job, requeue a plain message."""
        if not entry.is_doorbell or entry.job_id is None:
            raise Reject(reason="not taken here", requeue=True)
        self._process.claimer.decline([entry.job_id])
