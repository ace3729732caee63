"""Every metric of a worker: name, type, labels and meaning, in one place and in a registry of its own.

Names are `visionq_` and vLLM's suffixes where vLLM has the same thing, so that its dashboards need a prefix only. What
others count already (the engine, the caches) is read when somebody scrapes. `python -m worker.observability.metrics`
writes METRICS.md. Knows no job and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX: Final = "visionq_"

#: Seconds: from one decode step to a job that waited over night.
SHORT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)

#: Distinct (action, event) pairs that are kept apart; what comes after them shares one.
MAX_LOG_EVENTS: Final = 256

#: Read at scrape time, in this order: name without prefix, is it a counter, meaning.
READINGS: Final[Mapping[str, tuple[bool, str]]] = {
    "num_requests_running": (False, "Requests that are generating"),
    "num_requests_waiting": (False, "Requests in the engine that wait for their prefill"),
    "kv_cache_usage_perc": (False, "Share of the KV cache that requests hold, 1 is all of it"),
    "num_preemptions_total": (True, "Requests preempted, whose KV blocks were freed and are computed again later"),
    "prefix_cache_queries_total": (True, "Prompt tokens looked up among those of earlier prompts"),
    "prefix_cache_hits_total": (True, "Prompt tokens found there, whose keys and values were reused"),
    "mm_cache_queries_total": (True, "Images and clips asked for"),
    "mm_cache_hits_total": (True, "Images and clips that another job had read and decoded"),
    "mm_cache_evictions_total": (True, "Decoded images and clips evicted from the cache"),
    "mm_cache_bytes": (False, "Memory of the decoded images and clips that are kept"),
    "mm_memory_bytes": (False, "Memory reserved for decoded media of jobs that are not prepared yet"),
    "mm_memory_num_waiting": (False, "Jobs that wait for memory for their decoded media"),
    "mm_memory_waits_total": (True, "Jobs that had to wait for memory for their decoded media"),
    "vision_cache_queries_total": (True, "Pictures whose vision features were asked for"),
    "vision_cache_hits_total": (True, "Pictures whose vision features were reused"),
    "vision_cache_evictions_total": (True, "Vision features evicted from the cache"),
    "vision_cache_bytes": (False, "Memory of the vision features that are kept"),
    "vision_encoded_total": (True, "Pictures encoded by the vision tower"),
    "num_jobs_held": (False, "Jobs whose lease this worker holds: fetched, prepared, generating or ending"),
    "num_slots": (False, "Jobs that this worker can hold at once"),
    "redis_silent_seconds": (False, "Time since Redis last confirmed a heartbeat"),
    "is_ready": (False, "1 when the worker takes jobs and can answer them, as /readyz says"),
    "is_draining": (False, "1 once the worker takes no more jobs"),
}


class Metrics:
    """Counters and histograms of one worker. Every metric may be moved from any thread.

    `model_name` becomes a label of every sample.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = _LabelledRegistry({"model_name": model_name})
        self._log_events: set[tuple[str, str]] = set()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, meaning, labels, registry=self.registry)

        def histogram(name: str, meaning: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(PREFIX + name, meaning, buckets=tuple(buckets), registry=self.registry)

        self.request_queue_time = histogram("request_queue_time_seconds", "From queued to claimed, of each try", LONG_S)
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From submit to the first token", LONG_S)
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between two tokens of an answer", SHORT_S)
        self.e2e_request_latency = histogram("e2e_request_latency_seconds", "From submit to the answer's end", LONG_S)
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens prefilled")
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated")
        self.request_success = counter(
            "request_success_total", "Jobs completed, by the reason why the answer ended", "finished_reason"
        )
        self.request_failure = counter("request_failure_total", "Jobs ended without an answer, by error code", "code")
        self.request_retry = counter("request_retry_total", "Jobs given back to the queue, by reason", "reason")
        self.attempts = counter(
            "attempts_total", "Claims that ended, by outcome; lost: the job was another worker's by then", "outcome"
        )
        self.attempts_stopped = counter(
            "attempts_stopped_total", "Claims stopped before their answer was complete, by reason", "reason"
        )
        self.messages_dropped = counter(
            "messages_dropped_total", "Messages dropped because they have no usable job id, by reason", "reason"
        )
        self.claims_refused = counter("claims_refused_total", "Claims that the ledger refused, by reason", "reason")
        self.worker_sick = Gauge(
            PREFIX + "worker_sick",
            "1 while the worker claims no jobs because that component of it fails them",
            ("reason",),
            registry=self.registry,
        )
        self.media_fetch = histogram("media_fetch_seconds", "Waiting for storage, per job with media", LONG_S)
        self.media_fetch_bytes = counter("media_fetch_bytes_total", "Bytes of media read from storage")
        self.media_decode = histogram("media_decode_seconds", "Decoding, per job that had to", LONG_S)
        self.engine_step = histogram("engine_step_seconds", "One step of the engine", SHORT_S)
        self.engine_stage = counter("engine_stage_seconds_total", "Time of the engine's steps, by stage", "stage")
        self.log_events = counter(
            "log_events_total",
            "Log lines that have an action, by their fixed phrase",
            "level",
            "action",
            "event",
        )

    def count_dropped(self, reason: StrEnum) -> None:
        """Count a message that was dropped."""
        self.messages_dropped.labels(reason.value).inc()

    def count_log_event(self, level: str, action: str, event: str) -> None:
        """Count a log line. The number of distinct ones is bounded, whatever a library writes."""
        if (action, event) not in self._log_events:
            if len(self._log_events) >= MAX_LOG_EVENTS:
                action, event = "other", "other"
            self._log_events.add((action, event))
        self.log_events.labels(level, action, event).inc()

    def read_at_scrape(self, readings: Callable[[], Mapping[str, float]]) -> None:
        """Register the source of READINGS, which is called on a scraper's thread. Call it once."""
        self.registry.register(_Readings(readings))


class _LabelledRegistry(CollectorRegistry):
    """A registry that adds labels to every sample, and omits the `_created` series."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__()
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [
                sample._replace(labels=self._labels | sample.labels)
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield metric


class _Readings(Collector):
    """Values that are read at scrape time."""

    def __init__(self, readings: Callable[[], Mapping[str, float]]) -> None:
        self._readings = readings

    def describe(self) -> Iterable[Metric]:
        return [_family(name, 0.0) for name in READINGS]

    def collect(self) -> Iterable[Metric]:
        return [_family(name, value) for name, value in self._readings().items()]


def _family(name: str, value: float) -> Metric:
    is_counter, meaning = READINGS[name]
    kind = CounterMetricFamily if is_counter else GaugeMetricFamily
    return kind(PREFIX + name, meaning, value=value)


def table() -> str:
    """Return the Markdown table of all metrics."""
    metrics = Metrics("default")
    metrics.read_at_scrape(lambda: dict.fromkeys(READINGS, 0.0))
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics.registry.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in _labels(metrics, metric.name))
        lines.append(f"| `{name}` | {metric.type} | {labels} | {metric.documentation} |")
    return "\n".join(lines) + "\n"


def _labels(metrics: Metrics, name: str) -> tuple[str, ...]:
    collector = metrics.registry._names_to_collectors.get(name)
    return tuple(getattr(collector, "_labelnames", ()))


PAGE: Final = Path(__file__).with_name("METRICS.md")
INTRODUCTION: Final = """# Metrics of a worker

`GET /metrics` on `VISIONQ_HTTP_PORT`, in Prometheus' text format or OpenMetrics, whichever is asked for. Every sample
has the label `model_name`. Counters start at 0 with the process. One worker process per device, one port each: the
first device's port is the setting, the next ones follow.

"""


def page() -> str:
    """Return the content of METRICS.md."""
    return INTRODUCTION + table()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
