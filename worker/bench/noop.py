"""The baseline of the queue bench: plain Celery with one task that does nothing."""

from __future__ import annotations

from celery import Celery

from worker.settings import WorkerSettings

NOOP_TASK = "visionq_bench.noop"
NOOP_QUEUE = "visionq-bench-noop"


def noop_app(redis_url: str) -> Celery:
    """Return an app as a plain project would write it: JSON, late acknowledgement, result in Redis."""
    app = Celery("visionq_bench", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        task_default_queue=NOOP_QUEUE,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
    )
    app.task(name=NOOP_TASK)(_noop)
    return app


def serve_noop() -> None:
    """Consume with one thread from VISIONQ_REDIS_URL until SIGTERM. Blocks the main thread."""
    worker = noop_app(WorkerSettings().redis_url.get_secret_value()).Worker(
        pool="threads", concurrency=1, without_gossip=True, without_mingle=True, quiet=True, loglevel="WARNING"
    )
    worker.start()


def _noop() -> None:
    return None


if __name__ == "__main__":
    serve_noop()
