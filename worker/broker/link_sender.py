"""Sends the links of plain messages once their jobs are over: `link`, `link_error` and the next task of a chain.

In: finished jobs with links, from the ledger, whichever worker ended them. Out: Celery messages as a Celery worker
sends them after a task, with the result, or the failed task's id, before the signature's own arguments. A signature
without a queue goes to Celery's default queue, because the producer's routing is not known here.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery
from celery.canvas import signature
from kombu.exceptions import OperationalError

from api_stub.ledger.ledger import Ledger
from api_stub.ledger.outbox import Linked, LinkedJobs
from api_stub.ledger.settings import queue_options, tls_options
from api_stub.ledger.verdicts import Verdict
from worker.broker.app import CONNECT_TIMEOUT_S, SOCKET_TIMEOUT_S
from worker.broker.transport import is_of_connection, judge
from worker.jobs.links import Links
from worker.jobs.links import Signature as SignatureFields
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

DEFAULT_QUEUE: Final = "celery"
#: How often the ledger is asked for jobs that other processes ended; this process's own are sent for at once.
LOOK_S: Final = 1.0
MAX_TAKEN: Final = 10
#: How long no other process sends for the same job; after a refusal this is the pause before the next try.
LEASE_S: Final = 10.0
#: Unsettled jobs for which the process remembers which messages it has sent, so that it sends each once.
MAX_REMEMBERED: Final = 10_000
#: Fields that Celery writes into every signature, and other producers may leave out.
_EMPTY: Final[Mapping[str, object]] = {
    "args": (), "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False,
}  # fmt: skip
_TASK_IDS: Final = uuid.UUID("a5d0c2f8-6a53-5a1b-9a53-0c7a86f3f0f4")


def make_sender(settings: WorkerSettings) -> Celery:
    """Return the Celery app that sends links. It does not know the worker's own queue and tasks."""
    url = settings.redis_url.get_secret_value()
    app = Celery("visionq-links", broker=url, backend="disabled://", set_as_current=False)
    app.conf.update(
        broker_read_url=url,
        broker_write_url=url,
        broker_use_ssl=tls_options(url),
        broker_transport_options=queue_options(SOCKET_TIMEOUT_S, CONNECT_TIMEOUT_S),
        task_default_queue=DEFAULT_QUEUE,
        task_serializer="json",
        task_publish_retry=False,
    )
    return app


@dataclass(frozen=True, slots=True)
class _Message:
    """A task to send, and the argument before its own ones, which an immutable signature does not get."""

    signature: SignatureFields
    argument: object
    chain: tuple[SignatureFields, ...] | None = None


class LinkSender:
    """Sends links on one thread. A refused or failed message is tried again; one with a faulty signature is logged and
    skipped.
    """

    def __init__(self, app: Celery, ledger: Ledger) -> None:
        self._app, self._jobs = app, LinkedJobs(ledger.client, ledger.config)
        self._wakes, self._is_stopping = threading.Event(), False
        #: For jobs that are not settled yet: the numbers of the messages that were sent.
        self._sent: dict[str, set[int]] = {}
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Ask the ledger at once. Any thread."""
        self._wakes.set()

    def stop(self, timeout_s: float) -> None:
        """Send what is due, then end the thread."""
        self._is_stopping = True
        self._wakes.set()
        self._thread.join(timeout_s)

    def send_due(self) -> None:
        """Send for all jobs that are over. Raises the errors of a broker or a ledger that is away."""
        while jobs := self._jobs.take(MAX_TAKEN, LEASE_S):
            for forgotten in list(self._sent)[:-MAX_REMEMBERED]:
                del self._sent[forgotten]
            with self._app.connection_for_write() as connection:
                producer = self._app.amqp.Producer(connection, auto_declare=False)
                for job in jobs:
                    self._send_for(job, producer)

    def _send_for(self, job: Linked, producer: Any) -> None:
        links = Links.from_json(job.links)
        sent, is_refused = self._sent.setdefault(job.job_id, set()), False
        for number, message in enumerate(_messages(job, links)):
            if number in sent:
                continue
            facts = {"action": "link", "job_id": job.job_id, "task": message.signature.get("task")}
            try:
                self._send(message, number, job.job_id, links.root_id or job.job_id, producer)
            except Exception as error:  # Celery, kombu, Redis, or a serializer that the signature names
                if not _is_of_broker(error):
                    logger.exception("link cannot be sent", extra=facts)
                elif judge(error) is Verdict.LASTING:  # for this queue: no permission to write to it, or it is no list
                    logger.warning("link refused", extra=facts | {"error": str(error)})
                    is_refused = True
                    continue
                else:
                    raise
            sent.add(number)
        if is_refused:
            return
        del self._sent[job.job_id]
        self._jobs.settle(job, links.followers() if job.failure else ())

    def _send(self, message: _Message, number: int, job_id: str, root_id: str, producer: Any) -> None:
        task = signature(
            {**_EMPTY, **{name: value for name, value in message.signature.items() if value}}, app=self._app
        )
        options: dict[str, Any] = {"parent_id": job_id, "root_id": root_id, "producer": producer, "retry": False}
        if message.chain is not None:
            options["chain"] = list(message.chain)
        if not task.subtask_type and not task.options.get("task_id"):
            options["task_id"] = str(uuid.uuid5(_TASK_IDS, f"{job_id} {number}"))  # the same id when it is sent again
        task.apply_async((message.argument,), **options)

    def _run(self) -> None:
        while True:
            is_last = self._is_stopping
            try:
                self.send_due()
            except Exception as error:
                level = logging.WARNING if _is_of_broker(error) else logging.ERROR
                facts = {"action": "link", "error": type(error).__name__}
                logger.log(level, "links not sent yet", extra=facts, exc_info=level == logging.ERROR)
            if is_last:
                return
            self._wakes.wait(LOOK_S)
            self._wakes.clear()


def _messages(job: Linked, links: Links) -> Iterator[_Message]:
    """Yield the messages that Celery sends after a task: callbacks and the chain's next task on success, errbacks on
    failure, none for a revoked task.
    """
    if job.result is not None:
        for callback in links.callbacks:
            yield _Message(callback, job.result)
        if links.chain:
            yield _Message(links.chain[-1], job.result, links.chain[:-1])
    elif job.failure is not None:
        for errback in links.errbacks:
            yield _Message(errback, job.job_id)


def _is_of_broker(error: BaseException) -> bool:
    """Return whether an error is the broker's and not the signature's; kombu wraps both into OperationalError."""
    if isinstance(error, OperationalError) and error.__cause__ is not None:
        return _is_of_broker(error.__cause__)
    return is_of_connection(error)
