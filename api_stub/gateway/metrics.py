"""What the gateway counts, and the queues' depth at the moment somebody looks. One registry per gateway."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one process. Event loop only. What names models stands apart: not everybody may read it."""

    def __init__(self) -> None:
        self._registry, self._of_operators, self._of_queues = (
            CollectorRegistry(),
            CollectorRegistry(),
            CollectorRegistry(),
        )
        self._requests = Counter(
            "visionq_api_requests", "Requests answered", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "visionq_api_request_duration_seconds",
            "Time to the end of an answer, event streams excepted",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._errors = Counter("visionq_api_errors", "Requests that ended badly", ("code",), registry=self._registry)
        self._submitted = Counter(
            "visionq_api_jobs_submitted", "Jobs handed in", ("model",), registry=self._of_operators
        )
        self._webhooks = Counter(
            "visionq_api_webhooks",
            "Tries of webhooks, by how they went",
            ("outcome",),
            registry=self._registry,
        )
        self._batches = Counter(
            "visionq_api_batches_put_down",
            "Batches that a runner left before their end",
            ("why",),
            registry=self._registry,
        )
        self.readers = Gauge("visionq_api_open_readers", "Event streams open now", registry=self._registry)
        self._depth = Gauge(
            "visionq_queue_depth", "Queued and running jobs of a model", ("model",), registry=self._of_queues
        )

    def answered(self, method: str, route: str, status: int, seconds: float, *, is_stream: bool) -> None:
        """Count an answer."""
        self._requests.labels(method, route, str(status)).inc()
        if not is_stream:
            self._seconds.labels(method, route).observe(seconds)

    def failed(self, code: str) -> None:
        """Count a problem."""
        self._errors.labels(code).inc()

    def submitted(self, model: str) -> None:
        """Count a job that was handed in."""
        self._submitted.labels(model).inc()

    def webhook(self, outcome: str) -> None:
        """Count a try of a delivery."""
        self._webhooks.labels(outcome).inc()

    def batch_put_down(self, why: str) -> None:
        """Count a batch that a runner left: unavailable or mistake (it is tried again), given_up."""
        self._batches.labels(why).inc()

    def exposition(self, depths: Mapping[str, int], *, is_operator: bool = True) -> bytes:
        """Return the metrics in Prometheus' text format, with the depths of queues; for operators all of them."""
        self._depth.clear()
        for model, depth in depths.items():
            self._depth.labels(model).set(depth)
        shown = (
            (self._registry, self._of_queues, self._of_operators) if is_operator else (self._registry, self._of_queues)
        )
        return b"".join(map(generate_latest, shown))
