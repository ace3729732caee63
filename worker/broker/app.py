"""The Celery app and its worker: one queue, a pool of threads, one model.

The settings and why: late acknowledgement (with an early one a killed worker loses its jobs), one message per free
thread, no results and no retries by Celery (the ledger writes them once), socket timeouts everywhere (a half-open
connection would hang the worker for ever), no eta or countdown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from celery import Celery, bootsteps, signals
from celery.apps.worker import Worker
from celery.exceptions import Reject
from kombu import Queue

from api_stub.contract import names
from api_stub.ledger.settings import HEALTH_CHECK_S, queue_options, tls_options
from worker.jobs.entry import DropReason
from worker.lifecycle.consumption import Consumption
from worker.lifecycle.drain import Drain
from worker.lifecycle.job_process import JobProcess
from worker.settings import WorkerSettings

SOCKET_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 3.0
LOOP_TURN_S: Final = 1.0
#: A fallback only: after this time kombu redelivers the messages of a dead worker; their claims are refused then.
VISIBILITY_TIMEOUT_S: Final = 600
#: Beginnings of the log messages of Celery's consumer that quote a message's body.
WITH_BODIES: Final = ("Received unregistered", "Received invalid", "Received and deleted", "Can't decode")


def make_app(
    settings: WorkerSettings,
    on_entry: Callable[[], None] | None = None,
    on_drop: Callable[[DropReason], None] | None = None,
    on_unanswered: Callable[[Sequence[str]], None] | None = None,
    may_consume: Callable[[], bool] | None = None,
) -> Celery:
    """Return a Celery app for the settings' queue. Tasks are registered by worker.broker.tasks.

    on_entry: called for every entry that comes off the queue.
    on_drop: called with the reason for every entry that is dropped because it has no usable job id.
    on_unanswered: called with the ids of jobs whose doorbells were received on a connection that is closed.
    may_consume: while it returns False, nothing is received.
    """
    url = settings.redis_url.get_secret_value()
    queue = names.queue(settings.model_name)
    app = Celery(
        "visionq", broker=url, backend=url, amqp="worker.broker.transport:FastReconnectAMQP", set_as_current=False
    )
    app.conf.update(
        # Both set as well: CELERY_BROKER_URL, set for another Celery app on this machine, would override `broker`.
        broker_read_url=url,
        broker_write_url=url,
        broker_use_ssl=tls_options(url),
        redis_backend_use_ssl=tls_options(url),
        broker_transport="worker.broker.transport:GuardedTransport",
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_ignore_result=True,
        task_track_started=False,
        task_store_errors_even_if_ignored=False,
        task_reject_on_worker_lost=False,
        task_serializer="json",
        accept_content=["json"],
        result_serializer="json",
        result_expires=settings.result_ttl_s,
        result_extended=False,
        task_queues=[Queue(queue)],
        task_default_queue=queue,
        task_create_missing_queues=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=0.0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=settings.celery_events,
        # kombu reads the remote-control subscription on its hub; after a lost connection redis-py reconnects inside
        # that read and blocks there for ever: the process is alive and receives nothing. Remote control is not used.
        worker_enable_remote_control=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A full Redis, or one that is a replica for a moment, refuses the event loop's commands; they are retried.
        broker_channel_error_retry=True,
        broker_connection_timeout=4,
        broker_transport_options=_transport_options()
        | {"on_entry": on_entry, "on_drop": on_drop, "on_unanswered": on_unanswered, "may_consume": may_consume},
        redis_socket_timeout=SOCKET_TIMEOUT_S,
        redis_socket_connect_timeout=CONNECT_TIMEOUT_S,
        redis_retry_on_timeout=True,
        redis_socket_keepalive=True,
        redis_backend_health_check_interval=HEALTH_CHECK_S,
        task_publish_retry_policy={"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
    )
    return app


def _transport_options() -> dict[str, object]:
    return {
        **queue_options(SOCKET_TIMEOUT_S, CONNECT_TIMEOUT_S),
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
        "health_check_interval": HEALTH_CHECK_S,
        "retry_on_timeout": True,
        "queue_order_strategy": "round_robin",
    }


def without_bodies(record: logging.LogRecord) -> bool:
    """Remove message bodies, which hold users' texts, from Celery's log records. A logging filter; keeps all
    records.
    """
    if isinstance(record.msg, str) and record.msg.lstrip().startswith(WITH_BODIES):
        record.msg, record.args, record.exc_info = "message of an unknown task or format dropped", None, None
    return True


def without_rejections(record: logging.LogRecord) -> bool:
    """Drop Celery's warnings about messages that a task put back on purpose, and logged. A logging filter."""
    return not (record.exc_info and isinstance(record.exc_info[1], Reject))


def consumption_step(consumption: Consumption, drain: Drain) -> type[bootsteps.StartStopStep]:
    """Return a consumer step that reports the subscription and the event loop's turns to `consumption`.

    Celery starts and stops it with every connection to the broker. When the worker drains, it stops receiving: Celery
    would hold a message that arrives now until all running tasks have ended.
    """

    class Consuming(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, parent: Any) -> None:
            consumption.subscribed()
            parent.timer.call_repeatedly(LOOP_TURN_S, consumption.turned)

        def stop(self, parent: Any) -> None:
            consumption.unsubscribed()
            if drain.is_draining and parent.task_consumer is not None:
                parent.task_consumer.channel.stop_receiving()

    return Consuming


def serve(app: Celery, settings: WorkerSettings, process: JobProcess) -> int:
    """Consume until SIGTERM; return the process's exit status. Blocks the main thread."""

    def on_ready(**_: object) -> None:
        process.on_ready()

    def on_shutting_down(**_: object) -> None:
        process.shut_down()

    logging.getLogger("celery.worker.consumer.consumer").addFilter(without_bodies)
    logging.getLogger("celery.app.trace").addFilter(without_rejections)
    signals.worker_ready.connect(on_ready)
    signals.worker_shutting_down.connect(on_shutting_down)
    app.steps["consumer"].add(consumption_step(process.consumption, process.drain))
    worker: Worker = app.Worker(
        hostname=process.worker_name,
        pool="threads",
        concurrency=settings.concurrency,
        queues=[names.queue(settings.model_name)],
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return process.exit_status or int(worker.exitcode or 0)
