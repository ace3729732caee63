"""Metrics: one list of names, bounded series, counts that are right."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from api_stub.contract.result import FinishReason
from worker.engine.request import Ended, Finish, RequestOutput
from worker.lifecycle.health import Health, Vitals
from worker.lifecycle.watchdog import Finding, Trouble
from worker.observability.logging import CountingHandler
from worker.observability.metrics import MAX_LOG_EVENTS, PAGE, READINGS, Metrics, page
from worker.streaming.token_meter import TokenMeter


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "default"} | labels)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("default")


def test_the_page_of_metrics_is_the_metrics() -> None:
    assert PAGE.read_text() == page(), "run: python -m worker.observability.metrics"


def test_openmetrics_can_be_read_too(metrics: Metrics) -> None:
    metrics.read_at_scrape(lambda: dict.fromkeys(READINGS, 1.0))
    metrics.request_failure.labels("internal").inc()
    families = list(text_string_to_metric_families(generate_openmetrics(metrics.registry).decode()))
    assert len(families) == len({family.name for family in families}) > 30
    assert b"_created" not in generate_latest(metrics.registry)


def test_tokens_and_the_time_between_them_are_counted(metrics: Metrics) -> None:
    meter = TokenMeter(metrics)
    finish = Finish(
        FinishReason.STOP, num_prompt_tokens=7, num_completion_tokens=5, first_token_s=0.1, generate_s=1.0, error=None
    )
    meter.count([RequestOutput("a", "x", 0, 1, True)], at=1.0)
    meter.count([RequestOutput("a", "yz", 1, 2)], at=3.0)  # one of them had been held back
    meter.count([RequestOutput("a", "!", 3, 1, finish=finish)], at=4.0)
    assert value(metrics, "visionq_generation_tokens_total") == 5, "the token that ends the answer has no text"
    assert value(metrics, "visionq_prompt_tokens_total") == 7
    assert value(metrics, "visionq_inter_token_latency_seconds_count") == 3
    assert value(metrics, "visionq_inter_token_latency_seconds_sum") == 3.0
    assert meter._counted == {}


def test_a_request_that_generated_nothing_counts_nothing_and_is_forgotten(metrics: Metrics) -> None:
    meter = TokenMeter(metrics)
    finish = Finish(
        Ended.CANCELLED, num_prompt_tokens=7, num_completion_tokens=0, first_token_s=0.0, generate_s=0.0, error=None
    )
    meter.count([RequestOutput("a", "", 0, 0, finish=finish)], at=1.0)
    assert value(metrics, "visionq_prompt_tokens_total") == 0
    assert meter._counted == {}


def test_log_lines_with_an_action_are_counted_and_bounded(metrics: Metrics) -> None:
    logger = logging.Logger("worker.x")
    logger.addHandler(CountingHandler(metrics.count_log_event))
    logger.info("job started", extra={"action": "job"})
    logger.info("no action")
    logging.Handler.handle(logger.handlers[0], logging.makeLogRecord({"name": "kombu.y", "msg": "%s", "levelno": 30}))
    assert value(metrics, "visionq_log_events_total", level="INFO", action="job", event="job started") == 1
    for number in range(MAX_LOG_EVENTS + 10):
        logger.warning(f"odd {number}", extra={"action": "odd"})
    events = {sample.labels["event"] for family in metrics.registry.collect() for sample in family.samples
              if sample.name == "visionq_log_events_total"}  # fmt: skip
    assert {"other", "kombu"} < events
    assert len(events) <= MAX_LOG_EVENTS + 1


def vitals(**changed: object) -> Vitals:
    well: dict[str, object] = {
        "is_engine_alive": True, "is_publisher_alive": True, "is_consuming": True, "is_draining": False,
        "sick_of": "", "redis_silent_s": 0.1, "redis_refusal": None, "num_held": 0, "num_running": 0, "num_waiting": 0,
    }  # fmt: skip
    return Vitals(**(well | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "is_live", "is_ready", "word"),
    [
        ({}, True, True, ""),
        ({"is_engine_alive": False}, False, False, "engine"),
        ({"is_publisher_alive": False}, False, False, "publisher"),
        ({"is_consuming": False}, True, False, "not consuming"),
        ({"is_draining": True, "is_consuming": False}, True, False, "draining"),
        ({"sick_of": "storage: it refuses"}, True, False, "sick of storage: it refuses"),
        ({"redis_silent_s": 11.0}, True, False, "redis"),
        ({"redis_refusal": "redis is full (OOM)"}, True, False, "redis is full"),
    ],
)
def test_live_and_ready_are_two_things(changed: dict[str, object], is_live: bool, is_ready: bool, word: str) -> None:
    health = Health(10.0)
    assert (health.liveness().is_good, health.readiness().is_good) == (True, False), "loading"
    health.serve(lambda: vitals(**changed))
    assert (health.liveness().is_good, health.readiness().is_good) == (is_live, is_ready)
    assert word in str(health.readiness().problems)


def test_a_worker_beyond_help_is_neither() -> None:
    health = Health(10.0)
    health.serve(vitals)
    assert health.fail(Finding(Trouble.MUTE, "nothing taken"))
    assert not health.fail(Finding(Trouble.STALLED, "later"))
    assert health.liveness().problems == health.readiness().problems == ("mute: nothing taken",)
